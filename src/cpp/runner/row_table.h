// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "program/kv_layout.h"
#include "runner/control_writer.h"
#include "runner/grammar_masks.h"
#include "runner/prompt_scores.h"
#include "runner/row_lists.h"
#include "runner/runner_config.h"
#include "runner/word_pool.h"

namespace mrv1 {

// What the host knows of a row: upper bounds, where the device holds the truth. This is what each
// step touches, one cache line; RowHoldings has the rest.
struct alignas(64) HostRow {
  bool active = false;
  bool has_grammar = false;
  int32_t generation = 0;
  int32_t prefill_target = 0;
  // Bounds of num_computed after the steps launched so far. They differ for rows with drafts, by
  // what steps may still compute whose results have not been read.
  int32_t num_launched = 0;  // at most
  int32_t num_certain = 0;   // at least, if the row has not stopped
  int32_t max_total_len = 0;
  int32_t num_speculative_tokens = 0;
  int32_t capacity = 0;  // tokens that the blocks of every KV group hold
  // The bounds without what results have taken back, for retire().
  uint64_t sum_launched = 0, sum_certain = 0;
  uint64_t last_step = 0;
  uint64_t batch_mark = 0;  // newest execute() call that named the row
};
static_assert(sizeof(HostRow) == 64);

struct RowHoldings {
  std::vector<std::vector<int32_t>> blocks;  // by KV group; 0 where dropped
  int32_t* words = nullptr;                  // device memory of the row's lists
  int64_t num_words = 0;
  int32_t num_logprobs = -1;
  // Of the prompt: candidates beside each token, -1 for no logprobs, and what was scored before.
  int32_t num_prompt_logprobs = -1, num_scored = 0, prompt_len = 0;
  uint64_t staged_for = 0;  // step whose record carries the newest change of the row
};

// The rows of a runner as the host sees them, and the changes of the next control record. Nothing
// here touches the device: changes reach it with the record that write() makes.
class RowTable {
 public:
  // Bytes that a record of the runner can take.
  static size_t record_bytes(const RunnerConfig& config, size_t num_groups);

  // `send` must carry the staged changes away at once, by write() with no entries: called when they
  // fill a record, or must come before what is staged next. `new_words` gives device memory for
  // lists of rows, as WordPool asks for it. A row with a grammar draws by `masks` if they are there
  // when it comes.
  RowTable(const RunnerConfig& config, int32_t vocab_size, std::vector<KvGroup> groups,
           const GrammarMasks& masks, std::function<void()> send,
           std::function<int32_t*(int64_t)> new_words);

  // Candidates that the row reports beside each token, -1 for no logprobs.
  int32_t num_logprobs(int32_t row) const { return holdings_[row].num_logprobs; }
  bool has_logprobs() const { return num_with_logprobs_ > 0; }

  // See ModelRunner.
  void check_spec(const RowSpec& spec);
  // `taken` is called with the row once nothing can fail any more, before a change is sent.
  RowHandle add(const RowSpec& spec, const std::function<void(RowHandle)>& taken = {});
  void append_blocks(RowHandle row, int32_t group, std::span<const int32_t> block_ids,
                     bool distinct);
  void drop_blocks(RowHandle row, int32_t group, int32_t first, int32_t count);
  void free(RowHandle row);

  // Throws kInvalidArgument unless the row is in use, by the handle's request if it names one.
  HostRow& checked(RowHandle handle, const char* where) {
    const auto& [row, generation] = handle;
    if (row < 0 || row >= config_.max_num_seqs || !rows_[row].active ||
        (generation != kAnyGeneration && rows_[row].generation != generation)) {
      refuse_handle(handle, where);
    }
    return rows_[row];
  }
  uint64_t last_step(RowHandle row) const;
  // The newest step that drew for the row; 0 = none.
  uint64_t last_draw(int32_t row) const {
    const HostRow& host = rows_[row];
    return host.num_launched < host.prefill_target ? 0 : host.last_step;
  }
  // Words of device memory for the lists of rows, used or not.
  int64_t list_words() const { return words_.capacity(); }
  int32_t free_rows() const { return static_cast<int32_t>(free_rows_.size()); }

  // A step takes the row along. check_tokens() comes before.
  void launch(const BatchItem& item, uint64_t step);
  // Throws kInvalidArgument unless the row can compute that many tokens in a step, by what is
  // known.
  void check_tokens(const BatchItem& item, const HostRow& row) const;
  // Whether the item computes tokens that the prompt's next ones are scored from, or its last: if
  // so, which they are, but for the entry and the records' place. Before launch().
  bool scores(const BatchItem& item, ScoredTokens& scored) const;
  // Logits rows that the item asks for.
  static int32_t num_samples(const BatchItem& item, const HostRow& row);

  // A step's place among the row's, to tell how far behind its result is.
  struct Mark {
    int32_t row = -1, generation = 0;
    uint64_t sum_launched = 0, sum_certain = 0;
  };
  Mark mark(int32_t row) const;
  // A result has said how many tokens the row had computed at the mark: tightens the bounds.
  void retire(const Mark& mark, int32_t num_computed);

  // Writes the staged changes and a batch as a record, and forgets the changes.
  void write(ControlHeader* record, uint64_t step, uint64_t adopt_through,
             std::span<const BatchEntry> entries, const StepSizes& padded);
  // Forgets the staged changes, as the device that they are for is lost.
  void drop_changes();

 private:
  [[noreturn]] void refuse_handle(RowHandle handle, const char* where) const;
  [[noreturn]] void refuse_tokens(const BatchItem& item, const HostRow& row) const;
  // As check_spec(), but for lists that are too long, as RowLists::build() says.
  void check_fields(const RowSpec& spec);
  int32_t max_total_length(const RowSpec& spec) const;
  void check_group(int32_t group, const char* where) const;
  // The ids are in range, and neither repeated nor among those that the groups hold.
  void check_blocks(std::span<const std::vector<int32_t>> held, std::span<const int32_t> block_ids,
                    const char* where);
  // The first position of a group that a token at `position` sees.
  int32_t lowest_seen(int32_t group, int32_t position) const;
  void add_blocks(int32_t row, int32_t group, std::span<const int32_t> block_ids);
  // Sends what is staged if `bytes` more would not fit.
  void make_room(size_t bytes);
  void stage_tokens(int32_t row, int32_t start, std::span<const int32_t> tokens);
  void stage_blocks(int32_t row, int32_t group, int32_t start, std::span<const int32_t> blocks);
  void stage_words(int32_t* target, std::span<const int32_t> words);
  void zero_words(int32_t* target, int32_t count);
  SamplingRow sampling_row(const RowSpec& spec) const;

  const RunnerConfig& config_;
  const int32_t vocab_size_, max_blocks_;
  const std::vector<KvGroup> groups_;
  const GrammarMasks& masks_;
  const std::function<void()> send_;
  std::vector<HostRow> rows_;
  std::vector<RowHoldings> holdings_;  // by row
  std::vector<uint32_t> block_marks_;  // by block: newest check_blocks() call that saw it
  uint32_t block_mark_ = 0;
  std::vector<int32_t> free_rows_;
  WordPool words_;
  RowLists lists_;                 // scratch of add()
  int32_t num_with_logprobs_ = 0;  // rows
  ControlWriter staged_;
  uint64_t record_ = 1;  // number of the record that is being staged
};

}  // namespace mrv1
