// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace mrv1 {

struct StepContext;

// What the view is computed from: lengths by table row, [rows] each. encoder > 0: prefill of that
// many new tokens with `decoder` cached ones in front; else decoder > 0 and this_time > 0: decode;
// else the row is empty.
struct InferParamInputs {
  const int32_t* encoder;
  const int32_t* decoder;
  const int32_t* this_time;
  const int32_t* block_tables;  // [rows, blocks_per_row]
  int32_t rows;
  int32_t blocks_per_row;
  int32_t block_size;
  int32_t query_per_decode;  // 1 + the number of speculative tokens
};

// The batch in table-row order with prefill and decode apart: the outputs of PaddlePaddle
// FastDeploy's get_infer_param, under its names. Buffers are allocated once and filled in place;
// what a call does not fill is -1 (maps, slots, prefix_len) or the last sum (lods), so that fixed
// shapes can be replayed.
struct InferParamView {
  int32_t* encoder_batch_map;          // [rows] compact prefill index -> row
  int32_t* decoder_batch_map;          // [rows] compact decode index -> row
  int32_t* encoder_batch_idx;          // [rows] the same, -> row counted without the empty rows
  int32_t* decoder_batch_idx;          // [rows]
  int32_t* encoder_seq_lod;            // [rows + 1] cumulative new prefill tokens
  int32_t* decoder_seq_lod;            // [rows + 1] cumulative decode tokens
  int32_t* encoder_kv_lod;             // [rows + 1] cumulative new + cached tokens of prefill rows
  int32_t* prefix_len;                 // [rows] cached tokens of each prefill row
  int32_t* decoder_context_len;        // [rows] decoder + this_time of each decode row
  int32_t* decoder_context_len_cache;  // [rows] decoder of each decode row
  // [rows * blocks_per_row] block ids of the prefill rows, packed with stride len_info[5] =
  // ceil(longest prefill key/value length / block_size). Only if a prefill row has cached tokens;
  // else the stride is -1.
  int32_t* prefix_block_tables;
  int32_t* slot_mapping_enc;  // [max_tokens] cache slots of the prefill tokens
  int32_t* slot_mapping_dec;  // [rows * query_per_decode] cache slots of the decode tokens
  // [7] prefill rows, decode rows, new prefill tokens, longest prefill row, longest prefill
  // key/value length, stride of prefix_block_tables, longest decode context.
  int32_t* len_info;
  int32_t max_tokens;
};

// The whole computation, one pass over the rows.
MRV1_HD void fill_infer_param_view(const InferParamInputs& in, const InferParamView& out) {
  const auto slot = [&](int32_t row, int32_t position) {
    const int32_t block =
        in.block_tables[int64_t{row} * in.blocks_per_row + position / in.block_size];
    return block <= 0 ? -1 : block * in.block_size + position % in.block_size;
  };
  int32_t prefills = 0, decodes = 0, live = 0;
  int32_t new_tokens = 0, kv_tokens = 0, decode_tokens = 0;
  int32_t longest_new = 0, longest_kv = 0, longest_decode = 0;
  bool any_prefix = false;
  out.encoder_seq_lod[0] = out.encoder_kv_lod[0] = out.decoder_seq_lod[0] = 0;
  for (int32_t row = 0; row < in.rows; ++row) {
    const int32_t encoder = in.encoder[row], decoder = in.decoder[row];
    const int32_t this_time = in.this_time[row];
    if (encoder > 0) {
      out.encoder_batch_map[prefills] = row;
      out.encoder_batch_idx[prefills] = live++;
      out.prefix_len[prefills] = decoder;
      for (int32_t i = 0; i < encoder; ++i) {
        out.slot_mapping_enc[new_tokens + i] = slot(row, decoder + i);
      }
      new_tokens += encoder;
      kv_tokens += encoder + decoder;
      longest_new = encoder > longest_new ? encoder : longest_new;
      longest_kv = encoder + decoder > longest_kv ? encoder + decoder : longest_kv;
      any_prefix = any_prefix || decoder > 0;
      ++prefills;
      out.encoder_seq_lod[prefills] = new_tokens;
      out.encoder_kv_lod[prefills] = kv_tokens;
    } else if (decoder > 0 && this_time > 0) {
      out.decoder_batch_map[decodes] = row;
      out.decoder_batch_idx[decodes] = live++;
      out.decoder_context_len[decodes] = decoder + this_time;
      out.decoder_context_len_cache[decodes] = decoder;
      for (int32_t i = 0; i < in.query_per_decode; ++i) {
        out.slot_mapping_dec[decodes * in.query_per_decode + i] =
            i < this_time ? slot(row, decoder + i) : -1;
      }
      decode_tokens += this_time;
      longest_decode = decoder + this_time > longest_decode ? decoder + this_time : longest_decode;
      ++decodes;
      out.decoder_seq_lod[decodes] = decode_tokens;
    }
  }
  for (int32_t i = prefills; i < in.rows; ++i) {
    out.encoder_batch_map[i] = out.encoder_batch_idx[i] = out.prefix_len[i] = -1;
    out.encoder_seq_lod[i + 1] = new_tokens;
    out.encoder_kv_lod[i + 1] = kv_tokens;
  }
  for (int32_t i = decodes; i < in.rows; ++i) {
    out.decoder_batch_map[i] = out.decoder_batch_idx[i] = -1;
    out.decoder_context_len[i] = out.decoder_context_len_cache[i] = -1;
    out.decoder_seq_lod[i + 1] = decode_tokens;
    for (int32_t k = 0; k < in.query_per_decode; ++k) {
      out.slot_mapping_dec[i * in.query_per_decode + k] = -1;
    }
  }
  for (int32_t i = new_tokens; i < out.max_tokens; ++i) out.slot_mapping_enc[i] = -1;
  int32_t stride = -1;
  if (any_prefix) {
    stride = (longest_kv + in.block_size - 1) / in.block_size;
    for (int32_t i = 0; i < prefills; ++i) {
      const int64_t row = out.encoder_batch_map[i];
      for (int32_t k = 0; k < stride; ++k) {
        out.prefix_block_tables[i * stride + k] = in.block_tables[row * in.blocks_per_row + k];
      }
    }
  }
  const int32_t info[7] = {prefills,   decodes, new_tokens,    longest_new,
                           longest_kv, stride,  longest_decode};
  for (int32_t i = 0; i < 7; ++i) out.len_info[i] = info[i];
}

void infer_param_view_cpu(const InferParamInputs& in, const InferParamView& out,
                          const StepContext& ctx);
void infer_param_view_cuda(const InferParamInputs& in, const InferParamView& out,
                           const StepContext& ctx);

}  // namespace mrv1
