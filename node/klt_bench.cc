#include "node/klt_bench.h"

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/clock.h"
#include "kernels/implementation.h"
#include "kernels/linear.h"
#include "kernels/raw_codec.h"
#include "node/block_class.h"
#include "node/eval_past.h"
#include "node/eval_text.h"
#include "node/klt.h"
#include "node/requests.h"

namespace kvant::node {
namespace {

constexpr int kRounds = 3;  // the fastest counts

double SecondsSince(TimePoint started) { return Seconds(SteadyClock().Now() - started); }

// A prefix's state and what it took to compute.
struct Computed {
  std::vector<KltCoder::Rows> rows;  // [block]
  std::vector<std::vector<float>> entering;  // [block]
  double seconds = 0;
};

Result<Computed> Compute(const Model& model, Decoder* decoder, std::span<const int32_t> tokens) {
  const BlockClass exact_class(&model, &kernels::kRawBf16Codec, {});
  EncodedBlocks exact(&exact_class);
  PrefixState state(model.config(), tokens, 0);
  state.KeepEntering(std::vector<int>{0});
  const TimePoint started = SteadyClock().Now();
  KV_RETURN_IF_ERROR(PrefillBlocks(decoder, tokens, &exact, {}, &state));
  Computed computed;
  computed.seconds = SecondsSince(started);
  const auto width = static_cast<size_t>(StateWidth(model.config()));
  const auto hidden = static_cast<size_t>(model.config().hidden);
  for (int at = 0; at < state.tokens(); at += kBlockTokens) {
    const auto entering =
        state.entering(0).subspan(static_cast<size_t>(at) * hidden, kBlockTokens * hidden);
    computed.entering.emplace_back(entering.begin(), entering.end());
    KltCoder::Rows& block = computed.rows.emplace_back();
    for (int layer = 0; layer < state.layers(); ++layer) {
      GatherState(model, layer, at, kBlockTokens,
                  state.keys(layer) + static_cast<size_t>(at) * state.key_width(),
                  state.values(layer) + static_cast<size_t>(at) * state.value_width(),
                  block.emplace_back(kBlockTokens * width).data());
    }
  }
  return computed;
}

}  // namespace

Result<int> BenchKlt(const KltBenchOptions& options) {
  KV_RETURN_IF_ERROR(kernels::ChooseImplementation());
  KV_RETURN_IF_ERROR(kernels::LoadBlas());
  kernels::ThreadPool pool(1);
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(options.model));
  KV_ASSIGN_OR_RETURN(const KltPack pack, LoadKltPack(options.pack, *model));
  KV_ASSIGN_OR_RETURN(const EvalText text, EvalText::Load(options.text, &model->tokenizer()));
  KV_ASSIGN_OR_RETURN(const std::vector<EvalWindow> windows, text.Windows({options.tokens, 2, 1}));
  const std::vector<int32_t>& tokens = windows[0].prefix;
  const auto block_of = [&](size_t block) {
    return std::span(tokens).subspan(block * kBlockTokens, kBlockTokens);
  };
  Decoder decoder(model.get(), &pool);

  struct Row {
    std::string cuts;
    KltCoder coder;
    double encode_s = std::numeric_limits<double>::max();
    double decode_s = std::numeric_limits<double>::max();
    size_t bytes = 0;
  };
  std::vector<Row> rows;
  for (size_t cut = 0; cut < pack.cuts().size(); ++cut)
    rows.push_back({pack.cuts()[cut].name, {model.get(), &pack, {cut}}});
  if (pack.refining.size() > 1) {
    rows.push_back(
        {pack.cuts()[pack.refining.back()].name + ", refined", {model.get(), &pack, pack.refining}});
  }
  double prefill_s = std::numeric_limits<double>::max();
  for (int round = 0; round < kRounds; ++round) {
    KV_ASSIGN_OR_RETURN(const Computed computed, Compute(*model, &decoder, tokens));
    prefill_s = std::min(prefill_s, computed.seconds);
    for (Row& row : rows) {
      std::vector<KltCoder::Extents> coded(computed.rows.size());
      TimePoint started = SteadyClock().Now();
      for (size_t b = 0; b < coded.size(); ++b) {
        row.coder.Encode(computed.entering[b], static_cast<int>(b) * kBlockTokens, computed.rows[b],
                         &coded[b]);
      }
      row.encode_s = std::min(row.encode_s, SecondsSince(started));
      KltCoder::Rows made;
      row.bytes = 0;
      started = SteadyClock().Now();
      for (size_t b = 0; b < coded.size(); ++b) {
        KltReader reader(&row.coder, row.coder.Embeddings(block_of(b)),
                         static_cast<int>(b) * kBlockTokens);
        for (size_t group = 0; group < row.coder.groups(); ++group) {
          std::vector<std::span<const std::byte>> extents;
          for (const auto& of_cut : coded[b]) {
            extents.emplace_back(of_cut[group]);
            row.bytes += of_cut[group].size();
          }
          KV_RETURN_IF_ERROR(reader.Read(group, extents, &made));
        }
      }
      row.decode_s = std::min(row.decode_s, SecondsSince(started));
    }
  }

  const auto count = static_cast<double>(tokens.size());
  std::printf("%d tokens, one thread, OpenBLAS core type %s, kernels %s; prefill %.0f tokens/s\n",
              options.tokens, kernels::BlasCoreType().c_str(),
              std::string(kernels::ActiveImplementation().name).c_str(), count / prefill_s);
  std::printf("%-16s %10s %12s %8s %12s %8s\n", "cut", "bits/elt", "encode tok/s", "ratio",
              "decode tok/s", "ratio");
  nlohmann::json json = nlohmann::json::array();
  for (const Row& row : rows) {
    const double bits = 8.0 * static_cast<double>(row.bytes) / count / pack.layers / pack.width;
    std::printf("%-16s %10.3f %12.0f %8.2f %12.0f %8.2f\n", row.cuts.c_str(), bits,
                count / row.encode_s, prefill_s / row.encode_s, count / row.decode_s,
                prefill_s / row.decode_s);
    json.push_back({{"cut", row.cuts},
                    {"bits_per_element", bits},
                    {"prefill_tokens_per_s", count / prefill_s},
                    {"encode_tokens_per_s", count / row.encode_s},
                    {"decode_tokens_per_s", count / row.decode_s},
                    {"openblas_core_type", kernels::BlasCoreType()}});
  }
  if (!options.json.empty()) KV_RETURN_IF_ERROR(WriteFile(options.json, json.dump(2) + "\n"));
  return 0;
}

}  // namespace kvant::node
