// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/rank_followers.h"

#include <pthread.h>

#include <algorithm>
#include <exception>
#include <system_error>
#include <utility>

#include "core/error.h"
#include "dist/communicator.h"
#include "dist/expert_link.h"
#include "dist/stage_link.h"
#include "runner/data_ranks.h"

namespace mrv1 {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::string_view kWhere = "ranks";
// Between two looks at what others do.
constexpr std::chrono::microseconds kLook{100};
// What a group that has ended needs to come back from where it waits.
constexpr std::chrono::seconds kGrace{1};

}  // namespace

RankFollowers::RankFollowers(std::vector<std::unique_ptr<ModelRunner>> runners, int leader)
    : leader_(leader) {
  for (std::unique_ptr<ModelRunner>& runner : runners) {
    any_draws_ |= runner->has_logits();
    followers_.push_back(std::make_unique<Follower>());
    followers_.back()->runner = std::move(runner);
  }
  const RunnerConfig& config = followers_[0]->runner->config();
  const int32_t retiring = config.num_speculative_tokens > 0 ? config.max_num_seqs : 0;
  for (Command& command : commands_) {
    command.batch.reserve(config.max_num_seqs);
    command.ids.reserve(config.max_num_seqs);
    command.marks.reserve(retiring);
  }
  try {
    for (const std::unique_ptr<Follower>& follower : followers_) {
      follower->thread = std::thread([this, &follower = *follower] { run(follower); });
      pthread_setname_np(follower->thread.native_handle(), "mrv1-rank");
    }
  } catch (const std::system_error& error) {
    post(Kind::kStop, [](Command&) {});
    for (const std::unique_ptr<Follower>& follower : followers_) {
      if (follower->thread.joinable()) follower->thread.join();
    }
    fail(ErrorKind::kDevice, kWhere, "cannot start the thread of a rank: ", error.what());
  }
}

RankFollowers::~RankFollowers() {
  // A thread that is stuck is left alone, with its runner, by whoever ends the group.
  post(Kind::kStop, [](Command&) {});
  for (const std::unique_ptr<Follower>& follower : followers_) follower->thread.join();
}

// --- the leader's thread -------------------------------------------------------------------------

bool RankFollowers::all_done(uint64_t posted) const {
  return std::all_of(followers_.begin(), followers_.end(), [&](const auto& follower) {
    return follower->done.load(std::memory_order_acquire) >= posted;
  });
}

template <typename Fn>
void RankFollowers::wait_for(const Fn& fn) const {
  const Communicator& group = *followers_[0]->runner->communicator();
  auto give_up = Clock::time_point::max();
  while (!fn()) {
    std::this_thread::sleep_for(kLook);
    if (give_up == Clock::time_point::max()) {
      if (group.is_aborted()) give_up = Clock::now() + kGrace;
    } else if (Clock::now() > give_up) {
      group.check_alive();
    }
  }
}

// Once the group has ended nothing that followers do matters any more, and whoever calls has to go
// on without waiting for a thread that may be stuck: rows are still to be given back.
bool RankFollowers::await_done(uint64_t count) const {
  const Communicator& group = *followers_[0]->runner->communicator();
  while (!all_done(count)) {
    if (group.is_aborted()) return false;
    std::this_thread::sleep_for(kLook);
  }
  return true;
}

template <typename Fill>
void RankFollowers::post(Kind kind, const Fill& fill) {
  const uint64_t posted = posted_.load(std::memory_order_relaxed);
  const uint64_t read = posted < kCommands ? 0 : posted + 1 - kCommands;
  while (!await_done(read)) {
    if (kind != Kind::kStop) return;
    std::this_thread::sleep_for(kLook);
  }
  Command& command = commands_[posted % kCommands];
  command.kind = kind;
  fill(command);
  posted_.fetch_add(1, std::memory_order_release);
  posted_.notify_all();
}

void RankFollowers::add_row(const RowSpec& spec, RowHandle made) {
  post(Kind::kAddRow, [&](Command& command) {
    command.row = made;
    command.spec = std::make_shared<const RowSpec>(spec);
  });
}

void RankFollowers::append_blocks(RowHandle row, int32_t group,
                                  std::span<const int32_t> block_ids) {
  post(Kind::kAppendBlocks, [&](Command& command) {
    command.row = row;
    command.group = group;
    command.ids.assign(block_ids.begin(), block_ids.end());
  });
}

void RankFollowers::drop_blocks(RowHandle row, int32_t group, int32_t first, int32_t count) {
  post(Kind::kDropBlocks, [&](Command& command) {
    command.row = row;
    command.group = group;
    command.first = first;
    command.count = count;
  });
}

void RankFollowers::free_row(RowHandle row) {
  post(Kind::kFreeRow, [&](Command& command) { command.row = row; });
}

void RankFollowers::copy_blocks(std::span<const BlockCopy> copies) {
  post(Kind::kCopyBlocks,
       [&](Command& command) { command.copies.assign(copies.begin(), copies.end()); });
}

void RankFollowers::execute(std::span<const BatchItem> batch, const std::string& injected,
                            bool in_halves) {
  post(Kind::kExecute, [&](Command& command) {
    command.batch.assign(batch.begin(), batch.end());
    command.injected = injected;
    command.in_halves = in_halves;
  });
}

void RankFollowers::finish_step(std::span<const int32_t> rows, const uint32_t* masks,
                                int64_t words) {
  if (!any_draws_) return;  // what draws nothing is not cut
  MaskSet& set = mask_sets_[num_masked_++ % mask_sets_.size()];
  if (!await_done(set.until)) return;
  set.masks.clear();
  for (const int32_t row : rows) {
    set.masks.insert(set.masks.end(), masks + row * words, masks + (row + 1) * words);
  }
  post(Kind::kFinishStep, [&](Command& command) {
    command.ids.assign(rows.begin(), rows.end());
    command.words = words;
    command.masks = &set.masks;
  });
  set.until = posted_.load(std::memory_order_relaxed);
}

void RankFollowers::retire_rows(std::span<const RowTable::Mark> marks,
                                std::span<const int32_t> num_computed) {
  post(Kind::kRetireRows, [&](Command& command) {
    command.marks.assign(marks.begin(), marks.end());
    command.ids.assign(num_computed.begin(), num_computed.end());
  });
}

void RankFollowers::capture_graphs() {
  post(Kind::kCapture, [](Command&) {});
}

void RankFollowers::fill_kv_random(uint64_t seed) {
  post(Kind::kFillKv, [&](Command& command) { command.seed = seed; });
}

void RankFollowers::join() {
  const uint64_t posted = posted_.load(std::memory_order_relaxed);
  wait_for([&] { return all_done(posted); });
}

bool RankFollowers::has_retired(uint64_t step) const {
  return std::all_of(followers_.begin(), followers_.end(),
                     [&](const auto& follower) { return follower->runner->has_written(step); });
}

bool RankFollowers::settles(Clock::time_point until) {
  const uint64_t posted = posted_.load(std::memory_order_relaxed);
  while (!all_done(posted)) {
    if (Clock::now() > until) return false;
    std::this_thread::sleep_for(kLook);
  }
  return std::all_of(followers_.begin(), followers_.end(),
                     [&](const auto& follower) { return follower->runner->settles(until); });
}

// --- a follower's thread -----------------------------------------------------------------------

void RankFollowers::run(Follower& follower) {
  for (uint64_t done = 0;; ++done) {
    posted_.wait(done, std::memory_order_acquire);
    const Command& command = commands_[done % kCommands];
    if (command.kind == Kind::kStop) return;
    try {
      carry_out(follower, command);
    } catch (const std::exception& error) {
      Communicator& rank = *follower.runner->communicator();
      rank.abort(
          concat(rank.name(), " cannot do what ", rank.name_of(leader_), " did: ", error.what()));
    }
    follower.done.store(done + 1, std::memory_order_release);
  }
}

void RankFollowers::carry_out(Follower& follower, const Command& command) {
  ModelRunner& runner = *follower.runner;
  switch (command.kind) {
    case Kind::kAddRow: {
      const RowHandle made = runner.add_row(*command.spec);
      check_internal(made.row == command.row.row && made.generation == command.row.generation,
                     kWhere, "the request got row ", made.row, " instead of ", command.row.row);
      return;
    }
    case Kind::kAppendBlocks:
      // The leader has seen to it that the row does not hold them.
      return runner.append_blocks(command.row, command.group, command.ids, /*distinct=*/true);
    case Kind::kDropBlocks:
      return runner.drop_blocks(command.row, command.group, command.first, command.count);
    case Kind::kFreeRow:
      return runner.free_row(command.row);
    case Kind::kCopyBlocks:
      return runner.copy_blocks(command.copies);
    case Kind::kExecute:
      runner.execute(command.batch, command.injected, command.in_halves);
      return;
    case Kind::kFinishStep:
      if (!runner.has_logits()) return;
      runner.wait_masks();
      for (size_t i = 0; i < command.ids.size(); ++i) {
        std::copy_n(command.masks->data() + i * command.words, command.words,
                    runner.masks().mask(command.ids[i]).data());
      }
      return runner.finish_step();
    case Kind::kRetireRows:
      return runner.retire_rows(command.marks, command.ids);
    case Kind::kCapture:
      runner.capture_graphs();
      return;
    case Kind::kFillKv:
      return runner.fill_kv_random(command.seed);
    case Kind::kStop:
      return;
  }
}

// --- the group ---------------------------------------------------------------------------------

namespace {

// How long a device that has work left may take when nobody needs it any more.
constexpr std::chrono::seconds kLastWait{2};

// Between two calls of `progress` while others load.
constexpr std::chrono::milliseconds kProgressInterval{20};

void link_expert_buffers(const std::vector<std::unique_ptr<ModelRunner>>& runners) {
  std::vector<Communicator*> ranks;
  std::vector<std::vector<ExpertBuffers>> sets;  // by set, by rank
  for (const std::unique_ptr<ModelRunner>& runner : runners) {
    ranks.push_back(runner->communicator());
    const std::vector<ExpertBuffers> own = runner->expert_buffers();
    sets.resize(std::max(sets.size(), own.size()));
    for (size_t set = 0; set < own.size(); ++set) sets[set].push_back(own[set]);
  }
  for (size_t set = 0; set < sets.size(); ++set) {
    link_experts(ranks, sets[set], static_cast<int>(set));
  }
}

// Until when a group's devices may be at work that nobody needs any more.
Clock::time_point last_wait(ModelRunner& runner) {
  auto until = Clock::now() + kLastWait;
  if (!runner.communicator()->is_aborted()) until += runner.config().rank_timeout;
  return until;
}

// Each ends a group's runners, unless a device is stuck: its memory is in use for as long as it is.
void release(ModelRunner* leader) {
  if (leader->settles(last_wait(*leader))) delete leader;
}
void release_all(DataRanks* ranks) {
  if (ranks->settle(last_wait(ranks->runner(0)))) delete ranks;
}

}  // namespace

std::shared_ptr<ModelRunner> make_runner(const std::vector<std::shared_ptr<Device>>& devices,
                                         std::vector<Program> programs,
                                         const std::vector<RunnerConfig>& configs) {
  const size_t size = devices.size();
  check(size >= 1 && programs.size() == size && configs.size() == size, kWhere, "there are ", size,
        " devices, ", programs.size(), " programs and ", configs.size(),
        " configurations: one of each is needed for a rank");
  for (const RunnerConfig& config : configs) {
    check(config.num_ranks == static_cast<int32_t>(size), kWhere, "num_ranks is ", config.num_ranks,
          ", there are ", size, " devices");
    check(config.num_stages == configs[0].num_stages, kWhere,
          "num_stages differs: ", config.num_stages, " and ", configs[0].num_stages);
    check(config.data_parallel == configs[0].data_parallel, kWhere,
          "data_parallel differs between ranks");
  }
  if (size == 1) {
    return std::make_shared<ModelRunner>(devices[0], std::move(programs[0]), configs[0]);
  }
  const int32_t num_stages = configs[0].num_stages;
  std::vector<std::unique_ptr<Communicator>> group =
      make_group(devices, group_options(programs[0], configs[0]));
  for (size_t rank = 0; rank < size; ++rank)
    check_sums(*group[rank], programs[rank], configs[rank]);
  std::vector<std::unique_ptr<ModelRunner>> runners;
  for (size_t rank = 0; rank < size; ++rank) {
    const std::string name = group[rank]->name();
    try {
      runners.push_back(std::make_unique<ModelRunner>(devices[rank], std::move(programs[rank]),
                                                      configs[rank], std::move(group[rank])));
    } catch (const Error& error) {
      throw Error(error.kind(), concat("[", kWhere, "] ", name, ": ", error.what()));
    }
  }
  if (num_stages > 1) {
    std::vector<Communicator*> ranks;
    std::vector<StageBuffers> buffers;
    for (const std::unique_ptr<ModelRunner>& runner : runners) {
      ranks.push_back(runner->communicator());
      buffers.push_back(runner->stage_buffers());
    }
    link_stages(ranks, buffers);
  }
  if (configs[0].data_parallel) {
    link_expert_buffers(runners);
    const std::shared_ptr<DataRanks> ranks(new DataRanks(std::move(runners)), release_all);
    return {ranks, &ranks->runner(0)};
  }
  const auto leading = static_cast<std::ptrdiff_t>(size - size / num_stages);
  std::unique_ptr<ModelRunner> leader = std::move(runners[leading]);
  runners.erase(runners.begin() + leading);
  leader->lead(std::make_unique<RankFollowers>(std::move(runners), static_cast<int>(leading)));
  return {leader.release(), release};
}

void load_ranks(ModelRunner& leader, const MappedFile& file,
                std::span<const std::vector<TensorSource>> tensors,
                const std::function<void(size_t)>& progress) {
  const int size = leader.config().num_ranks;
  check(tensors.size() == static_cast<size_t>(size), "weights", "there are tensors for ",
        tensors.size(), " ranks, must be for ", size);
  std::atomic<size_t> done{0};
  std::atomic<bool> stop{false};
  std::atomic<int> running{0};
  std::vector<std::exception_ptr> errors(size);
  std::vector<std::thread> threads;
  const auto load = [&](int rank, const std::function<void(size_t)>& tell) {
    try {
      leader.rank_runner(rank).weights().load(file, tensors[rank], tell);
    } catch (...) {
      errors[rank] = std::current_exception();
      stop = true;
    }
  };
  const auto join = [&] {
    for (std::thread& thread : threads) thread.join();
    threads.clear();
  };
  try {
    for (int rank = 1; rank < size; ++rank) {
      ++running;
      threads.emplace_back([&, rank] {
        pthread_setname_np(pthread_self(), "mrv1-load");
        load(rank, [&](size_t bytes) {
          done += bytes;
          if (stop) fail(ErrorKind::kInternal, "weights", "the loading was ended");
        });
        --running;
      });
    }
  } catch (const std::system_error& error) {
    stop = true;
    join();
    fail(ErrorKind::kDevice, "weights", "cannot start a thread that loads: ", error.what());
  }
  load(0, [&](size_t bytes) {
    progress(bytes + done.exchange(0));
    if (stop) fail(ErrorKind::kInternal, "weights", "the loading was ended");
  });
  while (running > 0 && !stop) {
    std::this_thread::sleep_for(kProgressInterval);
    try {
      progress(done.exchange(0));
    } catch (...) {
      errors[0] = std::current_exception();
      stop = true;
    }
  }
  join();
  // The first to fail has stopped the others; theirs say only that.
  for (const std::exception_ptr& error : errors) {
    if (!error) continue;
    try {
      std::rethrow_exception(error);
    } catch (const Error& each) {
      if (each.kind() != ErrorKind::kInternal) throw;
    }
  }
  if (stop)
    std::rethrow_exception(
        *std::find_if(errors.begin(), errors.end(), [](const auto& e) { return e != nullptr; }));
  progress(done.exchange(0));
}

}  // namespace mrv1
