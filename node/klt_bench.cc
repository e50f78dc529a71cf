#include "node/klt_bench.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/clock.h"
#include "kernels/blas.h"
#include "kernels/implementation.h"
#include "kernels/raw_codec.h"
#include "kernels/thread_pool.h"
#include "node/bench_command.h"
#include "node/block_class.h"
#include "node/eval_past.h"
#include "node/eval_text.h"
#include "node/klt.h"
#include "node/klt_form.h"

namespace kvant::node {
namespace {

constexpr int kRounds = 3;  // the fastest counts

double SecondsSince(TimePoint started) { return Seconds(SteadyClock().Now() - started); }

// A block of a prefix and its exact payload.
struct Block {
  std::vector<int32_t> tokens;
  int position = 0;
  KltCoder::Rows rows;
  std::vector<std::vector<float>> keys;  // [layer][tokens x width]
  std::vector<std::vector<float>> values;
  std::vector<std::byte> payload;  // in codec raw
};

// A prefix's state and what it took to compute.
struct Computed {
  std::vector<Block> blocks;
  double seconds = 0;
};

Result<Computed> Compute(const Model& model, Decoder* decoder, std::span<const int32_t> tokens) {
  const BlockClass exact_class(&model, &kernels::kRawBf16Codec, {});
  EncodedBlocks exact(&exact_class);
  PrefixState state(model.config(), tokens, 0);
  const TimePoint started = SteadyClock().Now();
  KV_RETURN_IF_ERROR(PrefillBlocks(decoder, tokens, &exact, {}, &state));
  Computed computed;
  computed.seconds = SecondsSince(started);
  const auto width = static_cast<size_t>(StateWidth(model.config()));
  for (int at = 0; at < state.tokens(); at += kBlockTokens) {
    const auto of_block = tokens.subspan(static_cast<size_t>(at), kBlockTokens);
    Block& block = computed.blocks.emplace_back();
    block.tokens.assign(of_block.begin(), of_block.end());
    block.position = at;
    const std::span<const std::byte> payload = exact.payload(at / kBlockTokens);
    block.payload.assign(payload.begin(), payload.end());
    const auto part_of = [&](const float* from, size_t row) {
      const float* const begin = from + static_cast<size_t>(at) * row;
      return std::vector<float>(begin, begin + kBlockTokens * row);
    };
    for (int layer = 0; layer < state.layers(); ++layer) {
      block.keys.push_back(part_of(state.keys(layer), state.key_width()));
      block.values.push_back(part_of(state.values(layer), state.value_width()));
      GatherState(model, layer, at, kBlockTokens, block.keys.back().data(),
                  block.values.back().data(), block.rows.emplace_back(kBlockTokens * width).data());
    }
  }
  return computed;
}

// What is measured of a way to store blocks.
struct Row {
  std::string name;
  double encode_s = std::numeric_limits<double>::max();
  double decode_s = std::numeric_limits<double>::max();
  size_t bytes = 0;
};

// Predictions are kept from token to token of one pass, not from pass to pass.
Status MeasureCuts(const KltCoder& coder, std::span<const Block> blocks, Row* row) {
  std::vector<KltCoder::Extents> coded(blocks.size());
  KltPredictions of_encode(coder.transform(), kKltKeptBytes);
  TimePoint started = SteadyClock().Now();
  for (size_t b = 0; b < coded.size(); ++b)
    coder.Encode(KltSide::OfTokens(&coder, blocks[b].tokens, &of_encode), blocks[b].position,
                 blocks[b].rows, &coded[b]);
  row->encode_s = std::min(row->encode_s, SecondsSince(started));
  KltPredictions of_decode(coder.transform(), kKltKeptBytes);
  row->bytes = 0;
  started = SteadyClock().Now();
  for (size_t b = 0; b < coded.size(); ++b) {
    KltReader reader(&coder, KltSide::OfTokens(&coder, blocks[b].tokens, &of_decode),
                     blocks[b].position);
    for (size_t group = 0; group < coder.groups(); ++group) {
      std::vector<std::span<const std::byte>> extents;
      for (const auto& of_cut : coded[b]) {
        extents.emplace_back(of_cut[group]);
        row->bytes += of_cut[group].size();
      }
      // Side by side, as a node goes on with them.
      KV_RETURN_IF_ERROR(reader.Read(group, extents).status());
    }
  }
  row->decode_s = std::min(row->decode_s, SecondsSince(started));
  return OkStatus();
}

// An exact form, and that what is read is what was stored.
Status MeasureForm(const StoredForm& form, const AttendedPayload& attended, std::span<Block> blocks,
                   Row* row) {
  const std::vector<float> max_errors(attended.layout(Scope::kAll).rows().size());
  std::vector<StoredBlock> coded(blocks.size());
  TimePoint started = SteadyClock().Now();
  for (size_t b = 0; b < coded.size(); ++b) {
    BlockToStore block;
    block.tokens = blocks[b].tokens;
    block.position = blocks[b].position;
    block.max_errors = max_errors;
    block.keys = blocks[b].keys;
    block.values = blocks[b].values;
    form.Encode(block, blocks[b].payload, &coded[b]);
  }
  row->encode_s = std::min(row->encode_s, SecondsSince(started));
  std::vector<StoredRows> stored;
  row->bytes = 0;
  for (StoredBlock& block : coded) {
    row->bytes += block.bytes.size();
    stored.emplace_back(std::move(block));
  }
  std::vector<std::vector<std::byte>> read(blocks.size());
  for (size_t b = 0; b < read.size(); ++b) read[b].resize(blocks[b].payload.size());
  started = SteadyClock().Now();
  for (size_t b = 0; b < read.size(); ++b) {
    const std::unique_ptr<StoredReader> reader =
        form.MakeReader({stored[b].manifest(), blocks[b].tokens, blocks[b].position,
                         form.full_cuts(), read[b], &stored[b]});
    std::vector<int> ready;
    for (uint16_t layer = 0; layer < stored[b].manifest()->LayerEnd(); ++layer)
      KV_RETURN_IF_ERROR(reader->Arrived(layer, &ready));
  }
  row->decode_s = std::min(row->decode_s, SecondsSince(started));
  for (size_t b = 0; b < read.size(); ++b) KV_CHECK(read[b] == blocks[b].payload);
  return OkStatus();
}

}  // namespace

Result<int> BenchKlt(const KltBenchOptions& options) {
  KV_RETURN_IF_ERROR(kernels::ChooseImplementation());
  KV_RETURN_IF_ERROR(kernels::LoadBlas());
  kernels::ThreadPool pool(1);
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(options.model));
  KV_ASSIGN_OR_RETURN(const std::shared_ptr<const KltPack> pack,
                      FindKltPack(options.pack, options.model, *model));
  KV_ASSIGN_OR_RETURN(const EvalText text, EvalText::Load(options.text, &model->tokenizer()));
  KV_ASSIGN_OR_RETURN(const std::vector<EvalWindow> windows, text.Windows({options.tokens, 2, 1}));
  const std::vector<int32_t>& tokens = windows[0].prefix;
  Decoder decoder(model.get(), &pool);

  std::vector<KltCoder> coders;  // [row]; behind them forms
  std::vector<std::string> forms;
  std::vector<Row> rows;
  for (size_t cut = 0; cut < pack->cuts().size(); ++cut) {
    rows.push_back({pack->cuts()[cut].name});
    coders.emplace_back(model.get(), pack.get(), std::vector<size_t>{cut});
  }
  if (pack->refining.size() > 1) {
    rows.push_back({pack->cuts()[pack->refining.back()].name + ", refined"});
    coders.emplace_back(model.get(), pack.get(), pack->refining);
  }
  const AttendedPayload attended(kernels::kRawBf16Codec, model->config());
  // The first cut that others refine, and all of those.
  std::string cuts;
  for (size_t i = 0; i < pack->refining.size(); ++i) {
    cuts += pack->cuts()[pack->refining[i]].name + ",";
    if (i != 0 && i + 1 < pack->refining.size()) continue;
    rows.push_back({forms.emplace_back(cuts + std::string(kExactCut))});
  }
  rows.push_back({forms.emplace_back("lossless")});

  double prefill_s = std::numeric_limits<double>::max();
  for (int round = 0; round < kRounds; ++round) {
    KV_ASSIGN_OR_RETURN(Computed computed, Compute(*model, &decoder, tokens));
    prefill_s = std::min(prefill_s, computed.seconds);
    for (size_t i = 0; i < coders.size(); ++i)
      KV_RETURN_IF_ERROR(MeasureCuts(coders[i], computed.blocks, &rows[i]));
    for (size_t i = 0; i < forms.size(); ++i) {
      StoredFormPtr form = MakeLosslessForm(attended);
      if (i + 1 < forms.size()) {
        KV_ASSIGN_OR_RETURN(form, MakeKltForm(model.get(), pack, forms[i], {}, attended));
      }
      KV_RETURN_IF_ERROR(MeasureForm(*form, attended, computed.blocks, &rows[coders.size() + i]));
    }
  }

  const auto count = static_cast<double>(tokens.size());
  std::printf("%d tokens, one thread, OpenBLAS core type %s, kernels %s; prefill %.0f tokens/s\n",
              options.tokens, kernels::BlasCoreType().c_str(),
              std::string(kernels::ActiveImplementation().name).c_str(), count / prefill_s);
  std::printf("%-26s %10s %12s %8s %12s %8s\n", "cut", "bits/elt", "encode tok/s", "ratio",
              "decode tok/s", "ratio");
  nlohmann::json json = nlohmann::json::array();
  for (const Row& row : rows) {
    const double bits = 8.0 * static_cast<double>(row.bytes) / count / pack->layers / pack->width;
    std::printf("%-26s %10.3f %12.0f %8.2f %12.0f %8.2f\n", row.name.c_str(), bits,
                count / row.encode_s, prefill_s / row.encode_s, count / row.decode_s,
                prefill_s / row.decode_s);
    json.push_back({{"cut", row.name},
                    {"bits_per_element", bits},
                    {"prefill_tokens_per_s", count / prefill_s},
                    {"encode_tokens_per_s", count / row.encode_s},
                    {"decode_tokens_per_s", count / row.decode_s}});
  }
  KV_RETURN_IF_ERROR(WriteBenchRows(options.json, std::move(json)));
  return 0;
}

}  // namespace kvant::node
