// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
//
// References, the line of free blocks, and the prefix cache over them.
#include "engine/block_pool.h"

#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <vector>

#include "core/error.h"

namespace mrv1 {
namespace {

constexpr int32_t kSize = 4;

std::vector<int32_t> tokens_from(int32_t first) {
  std::vector<int32_t> tokens(kSize);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// Takes a block, caches it as this prefix and lets go of it; returns the block.
int32_t cache_one(BlockPool& pool, int32_t first, const CacheScope& scope = {}) {
  const int32_t block = pool.take();
  const int32_t prefix = pool.descend(BlockPool::kRoot, scope, tokens_from(first).data());
  pool.keep(prefix, 0, block);
  pool.unpin(prefix);
  pool.release(block);
  pool.check_invariants();
  return block;
}

}  // namespace

TEST_CASE("free blocks without content are taken first, then the longest unused") {
  BlockPool pool(6, kSize, 1);
  CHECK(pool.total() == 5);
  const int32_t a = cache_one(pool, 10);
  const int32_t b = cache_one(pool, 20);
  CHECK(pool.cached() == 2);
  // A use makes the first one the newest.
  pool.share(a);
  pool.release(a);
  std::vector<int32_t> order;
  for (int i = 0; i < 5; ++i) order.push_back(pool.take());
  CHECK(pool.free() == 0);
  CHECK(order[3] == b);
  CHECK(order[4] == a);
  CHECK(pool.cached() == 0);
  CHECK(pool.prefixes() == 0);
  CHECK_THROWS_AS(pool.take(), Error);
  for (const int32_t block : order) pool.release(block);
  CHECK_THROWS_AS(pool.release(order[0]), Error);
  pool.check_invariants();
}

TEST_CASE("a cached block is found until it is taken") {
  BlockPool pool(4, kSize, 1);
  const int32_t block = cache_one(pool, 5);
  const int32_t prefix = pool.find(BlockPool::kRoot, {}, tokens_from(5).data());
  REQUIRE(prefix != BlockPool::kNone);
  CHECK(pool.block_of(prefix, 0) == block);
  CHECK(pool.find(BlockPool::kRoot, {}, tokens_from(6).data()) == BlockPool::kNone);
  CHECK(pool.find(prefix, {}, tokens_from(5).data()) == BlockPool::kNone);
  for (int i = 0; i < 3; ++i) pool.take();
  CHECK(pool.find(BlockPool::kRoot, {}, tokens_from(5).data()) == BlockPool::kNone);
  pool.check_invariants();
}

TEST_CASE("scopes keep equal tokens apart, below the first block too") {
  BlockPool pool(8, kSize, 1);
  cache_one(pool, 5, {.adapter = -1, .salt = 1});
  for (const CacheScope& other : {CacheScope{-1, 2}, CacheScope{0, 1}, CacheScope{}}) {
    CHECK(pool.find(BlockPool::kRoot, other, tokens_from(5).data()) == BlockPool::kNone);
  }
  CHECK(pool.find(BlockPool::kRoot, {-1, 1}, tokens_from(5).data()) != BlockPool::kNone);
}

TEST_CASE("tokens decide, not their hash") {
  // Far more prefixes than buckets have bits: every one is found, and none that was not put in.
  constexpr int32_t kBlocks = 3000;
  BlockPool pool(kBlocks + 1, kSize, 1);
  for (int32_t i = 0; i < kBlocks; ++i) cache_one(pool, 7 * i);
  for (int32_t i = 0; i < 7 * kBlocks; ++i) {
    const bool there = pool.find(BlockPool::kRoot, {}, tokens_from(i).data()) != BlockPool::kNone;
    REQUIRE(there == (i % 7 == 0));
  }
}

TEST_CASE("a prefix outlives its block while something continues it") {
  BlockPool pool(4, kSize, 2);
  const int32_t first = pool.take(), second = pool.take();
  int32_t prefix = pool.descend(BlockPool::kRoot, {}, tokens_from(0).data());
  pool.keep(prefix, 0, first);
  const int32_t parent = prefix;
  prefix = pool.descend(prefix, {}, tokens_from(4).data());
  pool.keep(prefix, 1, second);
  pool.check_invariants();
  pool.forget(first);
  CHECK(pool.find(BlockPool::kRoot, {}, tokens_from(0).data()) == parent);
  CHECK(pool.block_of(parent, 0) == BlockPool::kNone);
  CHECK(pool.find(parent, {}, tokens_from(4).data()) == prefix);
  // Computed again, the block takes its old place.
  pool.keep(parent, 0, first);
  CHECK(pool.block_of(parent, 0) == first);
  pool.forget(first);
  pool.unpin(prefix);
  CHECK(pool.prefixes() == 2);
  pool.forget(second);
  CHECK(pool.prefixes() == 0);
  pool.check_invariants();
}

TEST_CASE("the first block of a prefix stays; another one with the same tokens is not cached") {
  BlockPool pool(4, kSize, 1);
  const int32_t block = cache_one(pool, 5);
  const int32_t twin = pool.take();
  const int32_t prefix = pool.descend(BlockPool::kRoot, {}, tokens_from(5).data());
  pool.keep(prefix, 0, twin);
  CHECK(pool.block_of(prefix, 0) == block);
  CHECK(!pool.is_cached(twin));
  pool.unpin(prefix);
  pool.release(twin);
  pool.check_invariants();
}

TEST_CASE("random use keeps the books") {
  std::mt19937 random(3);
  BlockPool pool(40, kSize, 2);
  struct Chain {
    std::vector<int32_t> blocks;
    int32_t prefix = BlockPool::kRoot;
    int32_t length = 0;
  };
  std::vector<Chain> chains(8);
  for (int round = 0; round < 4000; ++round) {
    Chain& chain = chains[random() % chains.size()];
    switch (random() % 4) {
      case 0:
        pool.unpin(chain.prefix);
        for (size_t i = chain.blocks.size(); i-- > 0;) pool.release(chain.blocks[i]);
        chain = {};
        break;
      case 1:
        if (!chain.blocks.empty()) pool.forget(chain.blocks[random() % chain.blocks.size()]);
        break;
      default: {
        if (pool.free() == 0) break;
        const auto tokens = tokens_from(static_cast<int32_t>(random() % 3));
        const int32_t found = pool.find(chain.prefix, {}, tokens.data());
        int32_t block = found == BlockPool::kNone ? BlockPool::kNone : pool.block_of(found, 0);
        if (block != BlockPool::kNone) {
          pool.share(block);
        } else {
          block = pool.take();
        }
        chain.blocks.push_back(block);
        chain.prefix = pool.descend(chain.prefix, {}, tokens.data());
        pool.keep(chain.prefix, 0, block);
      }
    }
    pool.check_invariants();
  }
}

}  // namespace mrv1
