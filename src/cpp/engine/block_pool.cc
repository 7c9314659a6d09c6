// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "engine/block_pool.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/error.h"

namespace mrv1 {
namespace {

constexpr std::string_view kWhere = "blocks";

uint64_t mixed(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
  return hash ^ (hash >> 29);
}

}  // namespace

BlockPool::BlockPool(int32_t num_blocks, int32_t block_size, int32_t num_groups)
    : block_size_(block_size), num_groups_(num_groups), blocks_(num_blocks) {
  for (int32_t block = 1; block < num_blocks; ++block) link_before(block, 0);
  const size_t prefixes = num_blocks;
  // Written once, so that no step touches a page of theirs for the first time.
  const auto commit = [](auto& items, size_t count) {
    items.resize(count);
    items.clear();
  };
  commit(prefixes_, prefixes);
  commit(prefix_tokens_, prefixes * block_size);
  commit(prefix_blocks_, prefixes * num_groups);
  buckets_.assign(std::bit_ceil(2 * prefixes), kNone);
}

// --- the line of free blocks -------------------------------------------------------------------

void BlockPool::link_before(int32_t block, int32_t next) {
  const int32_t previous = blocks_[next].previous;
  blocks_[block].previous = previous;
  blocks_[block].next = next;
  blocks_[previous].next = block;
  blocks_[next].previous = block;
  ++free_;
}

void BlockPool::unlink(int32_t block) {
  const Block& entry = blocks_[block];
  blocks_[entry.previous].next = entry.next;
  blocks_[entry.next].previous = entry.previous;
  --free_;
}

int32_t BlockPool::take() {
  check_internal(free_ > 0, kWhere, "none is free");
  const int32_t block = blocks_[0].next;
  unlink(block);
  blocks_[block].references = 1;
  forget(block);
  return block;
}

void BlockPool::share(int32_t block) {
  if (blocks_[block].references++ == 0) unlink(block);
}

void BlockPool::release(int32_t block) {
  Block& entry = blocks_[block];
  check_internal(block > 0 && entry.references > 0, kWhere, "block ", block, " was released twice");
  if (--entry.references > 0) return;
  link_before(block, entry.prefix == kNone ? blocks_[0].next : 0);
}

// --- prefixes ----------------------------------------------------------------------------------

uint64_t BlockPool::hash_of(int32_t parent, const CacheScope& scope, const int32_t* tokens) const {
  uint64_t hash = mixed(0x6D727631u, static_cast<uint32_t>(parent));
  if (parent == kRoot) {
    hash = mixed(mixed(hash, scope.salt), static_cast<uint32_t>(scope.adapter));
  }
  int32_t i = 0;
  for (; i + 2 <= block_size_; i += 2) {
    uint64_t word;
    std::memcpy(&word, tokens + i, sizeof(word));
    hash = mixed(hash, word);
  }
  if (i < block_size_) hash = mixed(hash, static_cast<uint32_t>(tokens[i]));
  return hash;
}

int32_t BlockPool::find(uint64_t hash, int32_t parent, const CacheScope& scope,
                        const int32_t* tokens) const {
  int32_t prefix = buckets_[hash & (buckets_.size() - 1)];
  for (; prefix != kNone; prefix = prefixes_[prefix].next) {
    const Prefix& entry = prefixes_[prefix];
    if (entry.hash != hash || entry.parent != parent) continue;
    if (parent == kRoot &&
        (entry.scope.salt != scope.salt || entry.scope.adapter != scope.adapter)) {
      continue;
    }
    if (std::equal(tokens, tokens + block_size_, tokens_of(prefix))) return prefix;
  }
  return kNone;
}

int32_t BlockPool::find(int32_t parent, const CacheScope& scope, const int32_t* tokens) const {
  return find(hash_of(parent, scope, tokens), parent, scope, tokens);
}

int32_t BlockPool::new_prefix() {
  ++live_prefixes_;
  if (unused_ != kNone) {
    const int32_t prefix = unused_;
    unused_ = prefixes_[prefix].next;
    return prefix;
  }
  prefixes_.emplace_back();
  prefix_tokens_.resize(prefix_tokens_.size() + block_size_);
  prefix_blocks_.resize(prefix_blocks_.size() + num_groups_, kNone);
  return static_cast<int32_t>(prefixes_.size()) - 1;
}

int32_t BlockPool::descend(int32_t parent, const CacheScope& scope, const int32_t* tokens) {
  const uint64_t hash = hash_of(parent, scope, tokens);
  int32_t prefix = find(hash, parent, scope, tokens);
  if (prefix == kNone) {
    prefix = new_prefix();
    int32_t& bucket = buckets_[hash & (buckets_.size() - 1)];
    prefixes_[prefix] = {parent, 0, bucket, scope, hash};
    bucket = prefix;
    std::copy(tokens, tokens + block_size_,
              prefix_tokens_.begin() + static_cast<int64_t>(prefix) * block_size_);
    if (parent != kRoot) ++prefixes_[parent].references;
  }
  pin(prefix);
  unpin(parent);
  return prefix;
}

void BlockPool::pin(int32_t prefix) {
  if (prefix != kRoot) ++prefixes_[prefix].references;
}

void BlockPool::unpin(int32_t prefix) {
  if (prefix != kRoot) drop_reference(prefix);
}

void BlockPool::drop_reference(int32_t prefix) {
  while (prefix != kRoot && --prefixes_[prefix].references == 0) {
    Prefix& entry = prefixes_[prefix];
    int32_t* link = &buckets_[entry.hash & (buckets_.size() - 1)];
    while (*link != prefix) link = &prefixes_[*link].next;
    *link = entry.next;
    entry.next = unused_;
    unused_ = prefix;
    --live_prefixes_;
    prefix = entry.parent;
  }
}

void BlockPool::keep(int32_t prefix, int32_t group, int32_t block) {
  int32_t& place = prefix_blocks_[static_cast<size_t>(prefix) * num_groups_ + group];
  Block& entry = blocks_[block];
  if (place != kNone || entry.prefix != kNone) return;
  place = block;
  entry.prefix = prefix;
  entry.group = group;
  ++prefixes_[prefix].references;
  ++cached_;
}

void BlockPool::forget(int32_t block) {
  Block& entry = blocks_[block];
  if (entry.prefix == kNone) return;
  prefix_blocks_[static_cast<size_t>(entry.prefix) * num_groups_ + entry.group] = kNone;
  const int32_t prefix = entry.prefix;
  entry.prefix = kNone;
  --cached_;
  drop_reference(prefix);
  if (entry.references == 0) {
    // A free block whose content is gone goes first.
    unlink(block);
    link_before(block, blocks_[0].next);
  }
}

void BlockPool::check_invariants() const {
  int32_t in_line = 0, with_content = 0;
  for (int32_t block = blocks_[0].next; block != 0; block = blocks_[block].next) {
    check_internal(blocks_[block].references == 0, kWhere, "block ", block, " is in use and free");
    check_internal(blocks_[blocks_[block].next].previous == block, kWhere, "the line is broken");
    ++in_line;
  }
  check_internal(in_line == free_, kWhere, in_line, " blocks are in the line of ", free_);
  std::vector<int32_t> owed(prefixes_.size(), 0);
  for (int32_t block = 1; block <= total(); ++block) {
    const Block& entry = blocks_[block];
    check_internal(entry.references >= 0, kWhere, "block ", block, " has negative references");
    in_line -= entry.references == 0;
    if (entry.prefix == kNone) continue;
    ++with_content;
    ++owed[entry.prefix];
    check_internal(block_of(entry.prefix, entry.group) == block, kWhere, "block ", block,
                   " is not its prefix's");
  }
  check_internal(in_line == 0, kWhere, "a block without references is not in the line");
  check_internal(with_content == cached_, kWhere, with_content, " blocks have content of ",
                 cached_);
  int32_t live = 0;
  for (const Prefix& prefix : prefixes_) {
    if (prefix.references > 0 && prefix.parent != kRoot) ++owed[prefix.parent];
  }
  for (size_t i = 0; i < prefixes_.size(); ++i) {
    // The rest are pins.
    check_internal(prefixes_[i].references >= owed[i], kWhere, "prefix ", i, " has ",
                   prefixes_[i].references, " references, ", owed[i], " are owed");
    live += prefixes_[i].references > 0;
  }
  check_internal(live == live_prefixes_, kWhere, live, " prefixes live of ", live_prefixes_);
}

}  // namespace mrv1
