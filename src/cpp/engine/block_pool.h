// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace mrv1 {

// What keeps equal prompts apart: requests share cached blocks only within one scope.
struct CacheScope {
  int32_t adapter = -1;
  uint64_t salt = 0;
};

// KV blocks with reference counts, and the prefix cache over them. All KV groups draw from it.
//
// A block without references is free. Free blocks form a line: those whose content nobody can ask
// for stand in front, then cached ones, the longest unused first. take() takes from the front, so
// a cached block is evicted when nothing else is left.
//
// The cache is a tree of prefixes. A prefix is its parent and block_size tokens (the first level:
// a scope and the tokens), compared as such; the hash only finds the place to look. It has at most
// one block a group. A prefix lives while it has a block, a child, or a pin of a request.
//
// Nothing is allocated after construction, unless prefixes outnumber the blocks (which takes groups
// that drop leading blocks).
class BlockPool {
 public:
  static constexpr int32_t kRoot = -1;  // the parent of first prefixes
  static constexpr int32_t kNone = -1;  // no such prefix, no such block

  // Blocks 1 to num_blocks - 1; block 0 is the null block.
  BlockPool(int32_t num_blocks, int32_t block_size, int32_t num_groups);

  int32_t total() const { return static_cast<int32_t>(blocks_.size()) - 1; }
  int32_t free() const { return free_; }
  int32_t cached() const { return cached_; }  // blocks with cached content, free or not
  int32_t prefixes() const { return live_prefixes_; }
  int32_t references(int32_t block) const { return blocks_[block].references; }

  // Takes a free block, which there must be; it has one reference and no cached content.
  int32_t take();
  // One more reference. A free block leaves the line.
  void share(int32_t block);
  // One reference less; without any the block joins the line.
  void release(int32_t block);

  // The prefix of these block_size tokens under a parent, or kNone. The scope counts under kRoot.
  int32_t find(int32_t parent, const CacheScope& scope, const int32_t* tokens) const;
  // The same, made if it is not there. The caller's pin moves from the parent to it.
  int32_t descend(int32_t parent, const CacheScope& scope, const int32_t* tokens);
  int32_t parent(int32_t prefix) const { return prefixes_[prefix].parent; }
  void pin(int32_t prefix);
  void unpin(int32_t prefix);
  // The block that holds a group's keys and values of the prefix's last tokens, or kNone.
  int32_t block_of(int32_t prefix, int32_t group) const {
    return prefix_blocks_[static_cast<size_t>(prefix) * num_groups_ + group];
  }
  // Makes a referenced block the prefix's, unless it has one or the block has another prefix.
  void keep(int32_t prefix, int32_t group, int32_t block);
  bool is_cached(int32_t block) const { return blocks_[block].prefix != kNone; }
  // The block's content is not to be found any more.
  void forget(int32_t block);

  // Throws kInternal unless counts, line and tree agree. Slow: for tests.
  void check_invariants() const;

 private:
  struct Block {
    int32_t references = 0;
    int32_t prefix = kNone;
    int32_t group = 0;
    int32_t previous = 0, next = 0;  // in the line, if free; block 0 is both ends
  };
  struct Prefix {
    int32_t parent = kRoot;
    int32_t references = 0;  // blocks, children and pins; 0 = not in use
    int32_t next = kNone;    // in its bucket, or among unused ones
    CacheScope scope;
    uint64_t hash = 0;
  };

  uint64_t hash_of(int32_t parent, const CacheScope& scope, const int32_t* tokens) const;
  int32_t find(uint64_t hash, int32_t parent, const CacheScope& scope, const int32_t* tokens) const;
  const int32_t* tokens_of(int32_t prefix) const {
    return prefix_tokens_.data() + static_cast<size_t>(prefix) * block_size_;
  }
  void link_before(int32_t block, int32_t next);
  void unlink(int32_t block);
  int32_t new_prefix();
  void drop_reference(int32_t prefix);

  int32_t block_size_, num_groups_;
  int32_t free_ = 0, cached_ = 0, live_prefixes_ = 0;
  std::vector<Block> blocks_;
  std::vector<Prefix> prefixes_;
  std::vector<int32_t> prefix_tokens_;  // [prefix, block_size]
  std::vector<int32_t> prefix_blocks_;  // [prefix, group]
  std::vector<int32_t> buckets_;        // first prefix by hash; a power of two
  int32_t unused_ = kNone;              // first unused prefix
};

}  // namespace mrv1
