// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "runner/row_table.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/error.h"

namespace mrv1 {
namespace {

// Room for changes in a control record besides one command of each kind a row. Longer changes (a
// long prompt) travel in records of their own before the step.
constexpr size_t kControlPayloadBytes = size_t{256} << 10;

}  // namespace

size_t RowTable::record_bytes(const RunnerConfig& config, size_t num_groups) {
  const size_t per_row = sizeof(FreeRow) + sizeof(NewRow) + 2 * sizeof(TokenWrite) +
                         2 * num_groups * sizeof(BlockWrite) + 2 * sizeof(WordWrite) +
                         sizeof(BatchEntry);
  return sizeof(ControlHeader) + config.max_num_seqs * per_row + kControlPayloadBytes;
}

RowTable::RowTable(const RunnerConfig& config, int32_t vocab_size, std::vector<KvGroup> groups,
                   const GrammarMasks& masks, std::function<void()> send,
                   std::function<int32_t*(int64_t)> new_words)
    : config_(config),
      vocab_size_(vocab_size),
      max_blocks_(max_blocks_per_row(config)),
      groups_(std::move(groups)),
      masks_(masks),
      send_(std::move(send)),
      rows_(config.max_num_seqs),
      holdings_(config.max_num_seqs),
      block_marks_(config.num_blocks, 0),
      words_(config.sampling_words, std::move(new_words)) {
  // The lowest free row is taken first.
  for (int32_t row = config_.max_num_seqs; row-- > 0;) free_rows_.push_back(row);
  staged_.reserve(config_.max_num_seqs);
}

void RowTable::refuse_handle(RowHandle handle, const char* where) const {
  const auto& [row, generation] = handle;
  check(row >= 0 && row < config_.max_num_seqs, where, "row ", row, " is outside [0, ",
        config_.max_num_seqs, ")");
  check(rows_[row].active, where, "row ", row, " is free");
  fail(ErrorKind::kInvalidArgument, where, "row ", row,
       " belongs to another request now: generation ", rows_[row].generation, ", not ", generation);
}

void RowTable::check_group(int32_t group, const char* where) const {
  check(group >= 0 && group < static_cast<int32_t>(groups_.size()), where, "KV group ", group,
        " is outside [0, ", groups_.size(), ")");
}

int32_t RowTable::lowest_seen(int32_t group, int32_t position) const {
  const int32_t window = groups_[group].window;
  return window > 0 ? std::max(0, position - window + 1) : 0;
}

void RowTable::check_blocks(std::span<const std::vector<int32_t>> held,
                            std::span<const int32_t> block_ids, const char* where) {
  ++block_mark_;
  for (const std::vector<int32_t>& blocks : held) {
    for (int32_t block : blocks) block_marks_[block] = block_mark_;
  }
  for (int32_t block : block_ids) {
    check(block > 0 && block < config_.num_blocks, where, "block id ", block, " is outside [1, ",
          config_.num_blocks, ")");
    check(block_marks_[block] != block_mark_, where, "block id ", block, " is in the row twice");
    block_marks_[block] = block_mark_;
  }
}

int32_t RowTable::max_total_length(const RowSpec& spec) const {
  return static_cast<int32_t>(
      std::min<int64_t>(int64_t{spec.prompt_len} + spec.max_tokens, config_.max_model_len));
}

void RowTable::check_fields(const RowSpec& spec) {
  const int32_t length = static_cast<int32_t>(spec.token_ids.size());
  const int32_t vocab = vocab_size_;
  const char* where = "add_row";
  check(!spec.token_ids.empty(), where, "token_ids is empty");
  check(spec.token_ids.size() < static_cast<size_t>(config_.max_model_len), where, "token_ids has ",
        spec.token_ids.size(), " tokens; with one to generate at most ", config_.max_model_len - 1,
        " fit max_model_len ", config_.max_model_len);
  for (int32_t token : spec.token_ids) {
    check(token >= 0 && token < vocab, where, "token id ", token, " is outside [0, ", vocab, ")");
  }
  check(spec.prompt_len >= 1 && spec.prompt_len <= length, where, "prompt_len ", spec.prompt_len,
        " is outside [1, ", length, "]");
  check(spec.num_computed >= 0 && spec.num_computed < length, where, "num_computed ",
        spec.num_computed, " is outside [0, ", length, "): the last token is always computed");
  check(std::isfinite(spec.temperature) && spec.temperature >= 0.0f, where, "temperature ",
        spec.temperature, " must be finite and not negative");
  check(spec.top_p > 0.0f && spec.top_p <= 1.0f, where, "top_p ", spec.top_p, " is outside (0, 1]");
  check(spec.min_p >= 0.0f && spec.min_p <= 1.0f, where, "min_p ", spec.min_p,
        " is outside [0, 1]");
  check(spec.top_k >= 0, where, "top_k ", spec.top_k, " must be 0 (off) or positive");
  check(spec.max_tokens >= 1, where, "max_tokens ", spec.max_tokens, " must be positive");
  check(spec.min_tokens >= 0 && spec.min_tokens <= spec.max_tokens, where, "min_tokens ",
        spec.min_tokens, " is outside [0, max_tokens = ", spec.max_tokens, "]");
  check(spec.num_speculative_tokens >= -1 &&
            spec.num_speculative_tokens <= config_.num_speculative_tokens,
        where, "num_speculative_tokens ", spec.num_speculative_tokens, " is outside [0, ",
        config_.num_speculative_tokens, "], what the runner was made for (-1: all)");
  check(spec.forced_token_ids.empty() || config_.force_tokens, where,
        "forced_token_ids need a runner with force_tokens");
  check(
      spec.forced_token_ids.size() <= static_cast<size_t>(config_.max_model_len - spec.prompt_len),
      where, "forced_token_ids has ", spec.forced_token_ids.size(), " tokens; at most ",
      config_.max_model_len - spec.prompt_len, " fit max_model_len ", config_.max_model_len);
  for (int32_t token : spec.forced_token_ids) {
    check(token >= 0 && token < vocab, where, "forced token id ", token, " is outside [0, ", vocab,
          ")");
  }
  check_row_lists(spec, vocab, config_.max_logprobs);
  check(spec.num_prompt_logprobs >= -1 && spec.num_prompt_logprobs <= config_.max_logprobs, where,
        "num_prompt_logprobs ", spec.num_prompt_logprobs, " is outside [-1, ", config_.max_logprobs,
        "], what the runner was made for (max_logprobs)");
  if (spec.num_prompt_logprobs >= 0) {
    check(spec.num_scored >= 0 && spec.num_scored < spec.prompt_len, where, "num_scored ",
          spec.num_scored, " is outside [0, prompt_len = ", spec.prompt_len, ")");
    check(spec.num_computed <= spec.num_scored, where, "num_computed ", spec.num_computed,
          " with num_prompt_logprobs: at most num_scored = ", spec.num_scored,
          " tokens may be computed, as the next ones could not be scored");
  }
  check(length < max_total_length(spec), where, "token_ids holds ", length - spec.prompt_len,
        " outputs already, max_tokens is ", spec.max_tokens);
  check(spec.block_ids.size() <= groups_.size(), where, "block_ids is for ", spec.block_ids.size(),
        " KV groups, there are ", groups_.size());
  std::vector<int32_t> all;
  for (size_t group = 0; group < spec.block_ids.size(); ++group) {
    const std::vector<int32_t>& blocks = spec.block_ids[group];
    check(blocks.size() <= static_cast<size_t>(max_blocks_), where, "a row holds ", max_blocks_,
          " blocks, not ", blocks.size());
    const auto first_seen = static_cast<size_t>(
        lowest_seen(static_cast<int32_t>(group), spec.num_computed) / config_.block_size);
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (blocks[i] != 0 || i >= first_seen) all.push_back(blocks[i]);
    }
  }
  if (!all.empty()) check_blocks({}, all, where);
}

void RowTable::check_spec(const RowSpec& spec) {
  check_fields(spec);
  SamplingRow sampling = sampling_row(spec);
  RowLists().build(spec, vocab_size_, max_total_length(spec), sampling);
}

SamplingRow RowTable::sampling_row(const RowSpec& spec) const {
  int32_t num_drafts = spec.num_speculative_tokens < 0 ? config_.num_speculative_tokens
                                                       : spec.num_speculative_tokens;
  // The place of a draft would need a mask of its own.
  if (spec.grammar) num_drafts = 0;
  return plain_sampling_row(spec, vocab_size_, num_drafts);
}

RowHandle RowTable::add(const RowSpec& spec, const std::function<void(RowHandle)>& taken) {
  check_fields(spec);
  check(!free_rows_.empty(), "add_row", "all ", config_.max_num_seqs, " rows are in use");

  // What may find no memory comes before anything is taken.
  SamplingRow sampling = sampling_row(spec);
  lists_.build(spec, vocab_size_, max_total_length(spec), sampling);
  if (lists_.num_words > 0) sampling.words = words_.allocate(lists_.num_words);
  const int32_t row = free_rows_.back();
  free_rows_.pop_back();
  if (spec.grammar) sampling.grammar_mask = masks_.device_mask(row);
  HostRow& host = rows_[row];
  const int32_t generation = host.generation + 1;
  host = HostRow{.active = true,
                 .has_grammar = spec.grammar,
                 .generation = generation,
                 .prefill_target = static_cast<int32_t>(spec.token_ids.size()),
                 .num_launched = spec.num_computed,
                 .num_certain = spec.num_computed,
                 .max_total_len = max_total_length(spec),
                 .num_speculative_tokens = sampling.num_speculative_tokens};
  RowHoldings& holdings = holdings_[row];
  holdings.words = sampling.words;
  holdings.num_words = lists_.num_words;
  holdings.num_logprobs = spec.num_logprobs;
  num_with_logprobs_ += spec.num_logprobs >= 0;
  holdings.num_prompt_logprobs = std::min(spec.num_prompt_logprobs, vocab_size_);
  holdings.num_scored = spec.num_scored;
  holdings.prompt_len = spec.prompt_len;
  holdings.blocks.resize(groups_.size());
  for (std::vector<int32_t>& held : holdings.blocks) {
    held.clear();  // it keeps its capacity
    held.reserve((host.max_total_len + config_.block_size - 1) / config_.block_size);
  }
  if (taken) taken({row, generation});

  NewRow command{};
  command.row = row;
  Row& state = command.state;
  state.generation = generation;
  state.phase = spec.num_computed > 0 ? RowPhase::kExtend : RowPhase::kPrefill;
  state.prompt_len = spec.prompt_len;
  state.prefill_target = host.prefill_target;
  state.num_computed = spec.num_computed;
  state.total_len = host.prefill_target;
  state.last_token = -1;
  state.min_total_len = static_cast<int32_t>(
      std::min<int64_t>(int64_t{spec.prompt_len} + spec.min_tokens, config_.max_model_len));
  state.max_total_len = host.max_total_len;
  state.adapter = -1;
  command.sampling = sampling;
  make_room(sizeof(NewRow));
  staged_.new_row(command);
  stage_tokens(row, 0, spec.token_ids);
  // They lie behind the histories of all rows.
  stage_tokens(config_.max_num_seqs + row, spec.prompt_len, spec.forced_token_ids);
  stage_words(sampling.words, lists_.words);
  zero_words(sampling.words + lists_.zeros_offset, static_cast<int32_t>(lists_.num_zeros));
  for (size_t group = 0; group < spec.block_ids.size(); ++group) {
    add_blocks(row, static_cast<int32_t>(group), spec.block_ids[group]);
  }
  holdings.staged_for = record_;
  return {row, generation};
}

void RowTable::append_blocks(RowHandle row, int32_t group, std::span<const int32_t> block_ids,
                             bool distinct) {
  const char* where = "append_blocks";
  checked(row, where);
  check_group(group, where);
  const auto& blocks = holdings_[row.row].blocks;
  const size_t held = blocks[group].size();
  check(held + block_ids.size() <= static_cast<size_t>(max_blocks_), where, "row ", row.row,
        " holds ", held, " of ", max_blocks_, " blocks, ", block_ids.size(), " more do not fit");
  if (!distinct) check_blocks(blocks, block_ids, where);
  add_blocks(row.row, group, block_ids);
}

void RowTable::add_blocks(int32_t row, int32_t group, std::span<const int32_t> block_ids) {
  RowHoldings& holdings = holdings_[row];
  std::vector<int32_t>& held = holdings.blocks[group];
  stage_blocks(row, group, static_cast<int32_t>(held.size()), block_ids);
  held.insert(held.end(), block_ids.begin(), block_ids.end());
  holdings.staged_for = record_;
  size_t least = held.size();
  for (const std::vector<int32_t>& blocks : holdings.blocks) {
    least = std::min(least, blocks.size());
  }
  rows_[row].capacity = static_cast<int32_t>(least) * config_.block_size;
}

void RowTable::drop_blocks(RowHandle row, int32_t group, int32_t first, int32_t count) {
  const char* where = "drop_blocks";
  const HostRow& host = checked(row, where);
  check_group(group, where);
  RowHoldings& holdings = holdings_[row.row];
  std::vector<int32_t>& held = holdings.blocks[group];
  // Steps in flight have the table as their own record left it, and may reject what they draft.
  const int32_t lowest = lowest_seen(group, host.num_certain);
  check(first >= 0 && count >= 0 && first <= static_cast<int32_t>(held.size()) - count, where,
        "blocks [", first, ", ", first + count, ") are outside the row's ", held.size());
  check(count == 0 || int64_t{first + count} * config_.block_size <= lowest, where, "blocks [",
        first, ", ", first + count, ") reach past position ", lowest, ", the first that KV group ",
        group, " still reads");
  std::fill_n(held.begin() + first, count, 0);
  stage_blocks(row.row, group, first, std::span(held).subspan(first, count));
  holdings.staged_for = record_;
}

void RowTable::free(RowHandle row) {
  HostRow& host = checked(row, "free_row");
  const RowHoldings& holdings = holdings_[row.row];
  // apply() frees before it writes: changes of this row that are still staged must go first.
  if (holdings.staged_for == record_) send_();
  make_room(sizeof(FreeRow));
  staged_.free_row({row.row, host.generation});
  words_.release(holdings.words, holdings.num_words);
  num_with_logprobs_ -= holdings.num_logprobs >= 0;
  host.active = false;
  free_rows_.push_back(row.row);
}

uint64_t RowTable::last_step(RowHandle handle) const {
  const auto& [row, generation] = handle;
  check(row >= 0 && row < config_.max_num_seqs, "last_step", "row ", row, " is outside [0, ",
        config_.max_num_seqs, ")");
  return rows_[row].last_step;
}

// --- staging -----------------------------------------------------------------------------------

void RowTable::make_room(size_t bytes) {
  // Commands are padded to 16 bytes in the record; 64 covers the array ends.
  if (staged_.record_bytes(config_.max_num_seqs) + bytes + 64 >
      record_bytes(config_, groups_.size())) {
    send_();
  }
}

void RowTable::stage_tokens(int32_t row, int32_t start, std::span<const int32_t> tokens) {
  constexpr size_t kPiece = kControlPayloadBytes / 2 / sizeof(int32_t);
  for (size_t i = 0; i < tokens.size(); i += kPiece) {
    const auto piece = tokens.subspan(i, std::min(kPiece, tokens.size() - i));
    make_room(sizeof(TokenWrite) + piece.size_bytes());
    staged_.write_tokens(row, start + static_cast<int32_t>(i), piece);
  }
}

void RowTable::stage_blocks(int32_t row, int32_t group, int32_t start,
                            std::span<const int32_t> blocks) {
  constexpr size_t kPiece = kControlPayloadBytes / 2 / sizeof(int32_t);
  for (size_t i = 0; i < blocks.size(); i += kPiece) {
    const auto piece = blocks.subspan(i, std::min(kPiece, blocks.size() - i));
    make_room(sizeof(BlockWrite) + piece.size_bytes());
    staged_.write_blocks(group, row, start + static_cast<int32_t>(i), piece);
  }
}

void RowTable::stage_words(int32_t* target, std::span<const int32_t> words) {
  constexpr size_t kPiece = kControlPayloadBytes / 2 / sizeof(int32_t);
  for (size_t i = 0; i < words.size(); i += kPiece) {
    const auto piece = words.subspan(i, std::min(kPiece, words.size() - i));
    make_room(sizeof(WordWrite) + piece.size_bytes());
    staged_.write_words(target + i, piece);
  }
}

void RowTable::zero_words(int32_t* target, int32_t count) {
  if (count == 0) return;
  make_room(sizeof(WordWrite));
  staged_.zero_words(target, count);
}

void RowTable::check_tokens(const BatchItem& item, const HostRow& row) const {
  const int32_t left = row.prefill_target - row.num_launched;
  int32_t needed = row.num_launched + item.num_tokens;  // tokens that the cache must hold
  bool fits = item.num_tokens >= 1;
  if (left > 0) {
    fits &= item.num_tokens <= left;
  } else {
    fits &= item.num_tokens <= 1 + row.num_speculative_tokens;
    fits &= row.num_certain < row.max_total_len - 1;
    // The device proposes no drafts past the length, and the last token is never computed.
    needed = std::min(needed, row.max_total_len - 1);
  }
  if (!fits) refuse_tokens(item, row);
  check(needed <= row.capacity, "execute", "row ", item.row, " needs ",
        (needed + config_.block_size - 1) / config_.block_size, " blocks for this step, has ",
        row.capacity / config_.block_size);
}

void RowTable::refuse_tokens(const BatchItem& item, const HostRow& row) const {
  const char* where = "execute";
  const int32_t left = row.prefill_target - row.num_launched;
  const int32_t most = 1 + row.num_speculative_tokens;
  check(left <= 0, where, "row ", item.row, " takes 1 to ", left, " prefill tokens, not ",
        item.num_tokens);
  check(item.num_tokens >= 1 && item.num_tokens <= most, where, "row ", item.row, " decodes ",
        most > 1 ? concat("1 to ", most, " tokens") : std::string("1 token"), " a step, not ",
        item.num_tokens);
  fail(ErrorKind::kInvalidArgument, where, "row ", item.row, " has reached its length of ",
       row.max_total_len, " tokens");
}

int32_t RowTable::num_samples(const BatchItem& item, const HostRow& row) {
  if (row.num_launched >= row.prefill_target) return item.num_tokens;
  return row.num_launched + item.num_tokens >= row.prefill_target ? 1 : 0;
}

bool RowTable::scores(const BatchItem& item, ScoredTokens& scored) const {
  const RowHoldings& holdings = holdings_[item.row];
  const int32_t begin = rows_[item.row].num_launched, end = begin + item.num_tokens;
  if (holdings.num_prompt_logprobs < 0 || begin >= holdings.prompt_len) return false;
  // The prompt's last token has none after it.
  const int32_t first = std::max(begin, holdings.num_scored);
  const int32_t last = std::min(end, holdings.prompt_len - 1);
  scored.first_token = first - begin;
  scored.count = std::max(0, last - first);
  scored.position = first + 1;
  scored.num_logprobs = holdings.num_prompt_logprobs;
  scored.complete = end >= holdings.prompt_len;
  return scored.count > 0 || scored.complete;
}

void RowTable::launch(const BatchItem& item, uint64_t step) {
  HostRow& row = rows_[item.row];
  const int32_t certain = row.num_launched >= row.prefill_target ? 1 : item.num_tokens;
  row.num_launched += item.num_tokens;
  row.num_certain += certain;
  row.sum_launched += item.num_tokens;
  row.sum_certain += certain;
  row.last_step = step;
}

RowTable::Mark RowTable::mark(int32_t row) const {
  const HostRow& host = rows_[row];
  return {row, host.generation, host.sum_launched, host.sum_certain};
}

void RowTable::retire(const Mark& mark, int32_t num_computed) {
  HostRow& row = rows_[mark.row];
  if (!row.active || row.generation != mark.generation) return;
  const auto most = static_cast<int32_t>(row.sum_launched - mark.sum_launched);
  const auto least = static_cast<int32_t>(row.sum_certain - mark.sum_certain);
  row.num_launched = std::min(row.num_launched, num_computed + most);
  row.num_certain = std::max(row.num_certain, num_computed + least);
}

void RowTable::write(ControlHeader* record, uint64_t step, uint64_t adopt_through,
                     std::span<const BatchEntry> entries, const StepSizes& padded) {
  staged_.write(record, step, adopt_through, entries, padded.num_requests, padded.num_tokens,
                padded.num_logits);
  ++record_;
}

void RowTable::drop_changes() {
  staged_.clear();
  ++record_;
}

}  // namespace mrv1
