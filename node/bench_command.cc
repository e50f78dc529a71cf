#include "node/bench_command.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "base/random.h"
#include "cache_service/service_bench.h"
#include "kernels/blas.h"
#include "kernels/implementation.h"
#include "kernels/kernel_bench.h"
#include "node/block_past.h"
#include "node/report.h"
#include "node/requests.h"
#include "transport/transport_bench.h"

namespace kvant::node {
namespace {

using Json = nlohmann::json;

Duration ToDuration(double seconds) {
  return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(seconds));
}

// `tokens` tokens of encoded keys and values drawn at random: speed does not depend on them.
std::vector<CachedBlockPtr> RandomPast(const BlockClass& block_class, int tokens) {
  const kernels::PayloadLayout& layout = block_class.layout();
  const auto elements = [](const kernels::SegmentShape& shape) {
    return static_cast<size_t>(shape.tokens * shape.kv_heads * shape.head_dim);
  };
  Random random(1);
  std::vector<float> x(std::max(elements(layout.shape().keys), elements(layout.shape().values)));
  for (float& value : x) value = static_cast<float>(random.Normal());
  std::vector<CachedBlockPtr> blocks;
  for (int begin = 0; begin < tokens; begin += kBlockTokens) {
    auto block = std::make_shared<CachedBlock>(block_class, BlockKey{}, block_class.FullCuts());
    for (int layer = 0; layer < layout.layers(); ++layer) {
      block_class.EncodeLayer(layer, x.data(), x.data(), block->bytes.data(), nullptr);
      block->MarkReady(layer);
    }
    blocks.push_back(std::move(block));
  }
  return blocks;
}

// Shapes of the products of one dense layer, for a block's rows.
std::vector<kernels::GemmShape> LayerShapes(const ModelConfig& config) {
  const int rows = kBlockTokens;
  const int hidden = config.hidden;
  std::vector<kernels::GemmShape> shapes = {{rows, config.q_width(), hidden},
                                            {rows, hidden, config.q_heads * config.value_dim()},
                                            {rows, config.intermediate, hidden},
                                            {rows, config.intermediate, hidden},
                                            {rows, hidden, config.intermediate}};
  if (config.latent) {
    const LatentAttention& latent = *config.latent;
    shapes.push_back({rows, latent.kv_rank + latent.rope_dim, hidden});
    shapes.push_back({rows, config.q_heads * latent.kv_rank, latent.nope_dim});
    shapes.push_back({rows, config.q_heads * latent.value_dim, latent.kv_rank});
  } else {
    shapes.push_back({rows, config.kv_width(), hidden});
    shapes.push_back({rows, config.kv_width(), hidden});
  }
  return shapes;
}

double Operations(const kernels::GemmShape& shape) {
  return 2.0 * shape.rows * shape.out_features * shape.in_features;
}

// What a block of prefill behind `context` tokens costs. Its last layer ends with keys and values.
double PrefillOperations(const ModelConfig& config, int context) {
  const kernels::LayerShape state = config.StateShape(1);
  const int key_dim = kernels::KeyDim(state);
  double dense = 0;
  for (const kernels::GemmShape& shape : LayerShapes(config)) dense += Operations(shape);
  const int kept = state.keys.kv_heads * state.keys.head_dim +
                   (state.latent ? 1 : state.keys.kv_heads) * state.values.head_dim;
  double operations = Operations({kBlockTokens, kept, config.hidden});
  for (int layer = 0; layer + 1 < config.layers; ++layer) {
    double attended = 0;
    for (int position = context; position < context + kBlockTokens; ++position)
      attended += position + 1 - config.FirstVisible(layer, position);
    operations += dense + 2.0 * config.q_heads * (key_dim + state.values.head_dim) * attended;
  }
  return operations;
}

// What plain sgemm reaches on the products of a layer, in operations a second.
Result<double> SgemmRate(const ModelConfig& config, kernels::ThreadPool* pool, Duration each) {
  double operations = 0;
  double seconds = 0;
  for (const kernels::GemmShape& shape : LayerShapes(config)) {
    KV_ASSIGN_OR_RETURN(const kernels::Rate rate, kernels::MeasurePlainGemm(shape, pool, each));
    operations += Operations(shape);
    seconds += Operations(shape) / rate.per_second;
  }
  return operations / seconds;
}

// Runs `once` for at least this long, once at least. Seconds of one round.
template <typename Once>
Result<double> TimeOf(Duration at_least, const Once& once) {
  const TimePoint started = SteadyClock().Now();
  int rounds = 0;
  do {
    KV_RETURN_IF_ERROR(once());
    ++rounds;
  } while (SteadyClock().Now() - started < at_least);
  return Seconds(SteadyClock().Now() - started) / rounds;
}

// The same after one round that is not counted.
template <typename Once>
Result<double> WarmTimeOf(Duration at_least, const Once& once) {
  KV_RETURN_IF_ERROR(once());
  return TimeOf(at_least, once);
}

struct NodeBench {
  const Model* model;
  kernels::ThreadPool* pool;
  Duration each;
};

Result<Json> PrefillRow(const NodeBench& bench, const BlockClass& block_class, Decoder* decoder,
                        int context) {
  const std::vector<CachedBlockPtr> blocks = RandomPast(block_class, context);
  BlockPast past(block_class, blocks, block_class.FullCuts(), nullptr);
  const std::vector<int32_t> tokens(kBlockTokens, 1);
  const LayerSink sink = [](int, const float*, const float*) { return OkStatus(); };
  // The logits are left out, as in the prefill of all blocks but a prompt's last tokens.
  KV_ASSIGN_OR_RETURN(const double seconds, WarmTimeOf(bench.each, [&] {
                        return decoder->Prefill({tokens, context, &past}, sink, nullptr);
                      }));
  const double operations = PrefillOperations(bench.model->config(), context);
  return Json{{"what", "prefill"},
              {"context", context},
              {"tokens_per_s", kBlockTokens / seconds},
              {"gflop_per_s", operations / seconds / 1e9}};
}

// Computes the blocks of a prompt, each over those before, and the last token's logits.
Status ComputePrompt(const BlockClass& block_class, Decoder* decoder,
                     std::span<const int32_t> tokens, OpenTile* open, float* logits) {
  std::vector<CachedBlockPtr> blocks;
  open->Clear();
  while (true) {
    BlockPast past(block_class, blocks, block_class.FullCuts(), nullptr);
    PrefillBlock block;
    block.position = past.tokens();
    block.tokens = tokens.subspan(static_cast<size_t>(block.position));
    block.past = &past;
    if (block.tokens.size() <= kBlockTokens) return decoder->PrefillTail(block, open, logits);
    block.tokens = block.tokens.first(kBlockTokens);
    const auto made =
        std::make_shared<CachedBlock>(block_class, BlockKey{}, block_class.FullCuts());
    const LayerSink sink = [&](int layer, const float* keys, const float* values) {
      block_class.EncodeLayer(layer, keys, values, made->bytes.data(), nullptr);
      made->MarkReady(layer);
      return OkStatus();
    };
    KV_RETURN_IF_ERROR(decoder->Prefill(block, sink, nullptr));
    blocks.push_back(made);
  }
}

Result<Json> PromptRow(const NodeBench& bench, const BlockClass& block_class, Decoder* decoder,
                       int length) {
  const ModelConfig& config = bench.model->config();
  if (length > config.max_positions) {
    return InvalidArgument("a prompt of {} tokens: the model has {} positions at most", length,
                           config.max_positions);
  }
  const std::vector<int32_t> prompt(static_cast<size_t>(length), 1);
  std::vector<float> logits(static_cast<size_t>(config.vocab));
  OpenTile open(config);
  const auto compute = [&](std::span<const int32_t> tokens) {
    return ComputePrompt(block_class, decoder, tokens, &open, logits.data());
  };
  // Two blocks make everything warm: all of a long prompt takes a minute.
  KV_RETURN_IF_ERROR(
      compute(std::span(prompt).first(std::min<size_t>(prompt.size(), 2 * kBlockTokens))));
  KV_ASSIGN_OR_RETURN(const double seconds, TimeOf(bench.each, [&] { return compute(prompt); }));
  double operations = 0;
  for (int context = 0; context < length; context += kBlockTokens)
    operations += PrefillOperations(config, context);
  return Json{{"what", "prompt"},
              {"context", length},
              {"tokens_per_s", length / seconds},
              {"gflop_per_s", operations / seconds / 1e9}};
}

Result<Json> DecodeRowOf(const NodeBench& bench, const BlockClass& block_class, Decoder* decoder,
                         int context, int sequences) {
  const ModelConfig& config = bench.model->config();
  const auto count = static_cast<size_t>(sequences);
  std::vector<std::vector<CachedBlockPtr>> blocks;
  std::vector<BlockPast> pasts;
  pasts.reserve(count);
  blocks.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    blocks.push_back(RandomPast(block_class, context));
    pasts.emplace_back(block_class, blocks.back(), block_class.FullCuts(), nullptr);
  }
  std::vector<OpenTile> open(count, OpenTile(config));
  std::vector<DecodeRow> rows(count);
  std::vector<float> logits(count * static_cast<size_t>(config.vocab));
  KV_ASSIGN_OR_RETURN(const double seconds, WarmTimeOf(bench.each, [&] {
                        for (size_t i = 0; i < count; ++i) {
                          open[i].Clear();
                          rows[i].position = context;
                          rows[i].past = &pasts[i];
                          rows[i].open = &open[i];
                        }
                        decoder->DecodeStep(rows, logits.data());
                        for (const DecodeRow& row : rows) KV_RETURN_IF_ERROR(row.status);
                        return OkStatus();
                      }));
  // Of what is attended: layers with a window leave older blocks out.
  uint64_t attended = 0;
  for (size_t block = 0; block < blocks[0].size(); ++block) {
    const Scope scope = block_class.ScopeAttended(block, static_cast<size_t>(context));
    attended += block_class.BytesOf(Portion(block_class.FullCuts(), scope));
  }
  const double kv_bytes = static_cast<double>(attended * count);
  const kernels::Rate read = kernels::MeasureRead(static_cast<size_t>(std::max(kv_bytes, 65536.0)),
                                                  bench.pool, bench.each / 4);
  return Json{
      {"what", "decode"},
      {"context", context},
      {"sequences", sequences},
      {"tokens_per_s", sequences / seconds},
      {"weights_gb_per_s", static_cast<double>(bench.model->weight_bytes()) / seconds / 1e9},
      {"kv_gb_per_s", kv_bytes / seconds / 1e9},
      {"read_gb_per_s", read.per_second / 1e9}};
}

// What attention is measured with. The first is the model of docs/performance.md, whole; the others
// are one layer of it.
struct KernelShape {
  std::string name;  // of heads: their size, and of latents key and value
  kernels::LayerShape state;
  int q_heads = 0;
  int context = 0;
  int layers = 0;
};

std::vector<KernelShape> KernelShapes() {
  const auto state = [](int kv_heads, int head_dim) {
    return kernels::KeysAndValues({kBlockTokens, kv_heads, head_dim});
  };
  std::vector<KernelShape> shapes = {{"64", state(4, 64), 16, 16384, 12},
                                     {"64", state(4, 64), 16, 4096, 12}};
  for (const int head_dim : {64, 96, 128, 192, 256})
    shapes.push_back({std::to_string(head_dim), state(2, head_dim), 8, 8192, 1});
  for (const int group : {1, 8, 16}) shapes.push_back({"128", state(2, 128), 2 * group, 8192, 1});
  const kernels::LayerShape latent = {{kBlockTokens, 1, 64}, {kBlockTokens, 1, 512}, true};
  shapes.push_back({"576/512", latent, 16, 8192, 1});
  return shapes;
}

// Dense layers of decode: weights of each form that come from memory, for one row and for several.
void BenchLinear(kernels::ThreadPool* pool, Duration each, Json* rows) {
  constexpr int kWidth = 2048;
  constexpr size_t kWeightBytes = size_t{256} << 20;
  const double read = kernels::MeasureRead(kWeightBytes, pool, each).per_second;
  std::printf("\n%-12s %-6s %9s %6s %8s %9s %9s %7s %9s\n", "kernel", "form", "width", "rows",
              "threads", "GB/s", "limit", "share", "GFLOP/s");
  for (const auto form :
       {kernels::WeightForm::kExact, kernels::WeightForm::kBf16, kernels::WeightForm::kInt8}) {
    for (const int count : {1, 8}) {
      const kernels::LinearRate rate =
          kernels::MeasureLinear({count, kWidth, kWidth}, form, kWeightBytes, pool, each);
      // Weights drawn at random are no bf16 numbers: exact, they are fp32.
      const std::string name =
          form == kernels::WeightForm::kExact ? "fp32" : std::string(WeightFormName(form));
      std::printf("%-12s %-6s %9d %6d %8d %9.2f %9.2f %6.0f%% %9.1f\n", "linear", name.c_str(),
                  kWidth, count, pool->threads(), rate.weight_bytes / 1e9, read / 1e9,
                  100 * rate.weight_bytes / read, rate.operations / 1e9);
      rows->push_back({{"kernel", "linear"},
                       {"isa", kernels::ActiveImplementation().name},
                       {"weights", name},
                       {"width", kWidth},
                       {"rows", count},
                       {"threads", pool->threads()},
                       {"gb_per_s", rate.weight_bytes / 1e9},
                       {"read_gb_per_s", read / 1e9},
                       {"gflop_per_s", rate.operations / 1e9}});
    }
  }
}

}  // namespace

Status WriteBenchRows(const std::string& path, nlohmann::json rows) {
  for (Json& row : rows) {
    row["cpu"] = kernels::CpuName();
    row["openblas_core_type"] = kernels::BlasCoreType();
    row["compiler"] = kernels::CompilerName();
  }
  return path.empty() ? OkStatus() : WriteFile(path, rows.dump(2) + "\n");
}

Result<int> BenchTransport(const BenchOptions& options, int* argc, char*** argv) {
  TransportBenchOptions bench;
  bench.backends = options.backends;
  bench.sizes_bytes = options.sizes_bytes;
  bench.poll_before_sleep = ToDuration(options.poll_us / 1e6);
  bench.time_per_row = ToDuration(options.seconds_per_row);
  std::unique_ptr<MpiSession> session;
  if (MpiSession::LaunchedByMpi()) {
    KV_ASSIGN_OR_RETURN(session, MpiSession::Create(argc, argv));
    bench.mpi = session.get();
  }
  KV_ASSIGN_OR_RETURN(const std::vector<TransportBenchRow> rows, RunTransportBench(bench));
  if (session != nullptr && session->rank() != 0) return 0;
  Json json = Json::array();
  std::printf("%-9s %-4s %9s %4s %10s %10s %8s %8s %7s %9s %9s\n", "backend", "op", "bytes", "out",
              "p50 us", "p99 us", "GB/s", "plain", "ratio", "cpu s/GiB", "plain cpu");
  for (const TransportBenchRow& row : rows) {
    std::printf(
        "%-9s %-4s %9llu %4u %10.1f %10.1f %8.2f %8.2f %6.0f%% %9.3f %9.3f\n", row.backend.c_str(),
        row.op.c_str(), static_cast<unsigned long long>(row.size_bytes), row.outstanding,
        row.latency_us_p50, row.latency_us_p99, row.gb_per_s, row.plain_gb_per_s,
        100 * row.gb_per_s / row.plain_gb_per_s, row.cpu_s_per_gib, row.plain_cpu_s_per_gib);
    json.push_back({{"backend", row.backend},
                    {"op", row.op},
                    {"size_bytes", row.size_bytes},
                    {"outstanding", row.outstanding},
                    {"latency_us_p50", row.latency_us_p50},
                    {"latency_us_p99", row.latency_us_p99},
                    {"gb_per_s", row.gb_per_s},
                    {"cpu_s_per_gib", row.cpu_s_per_gib},
                    {"plain_gb_per_s", row.plain_gb_per_s},
                    {"plain_latency_us_p50", row.plain_latency_us_p50},
                    {"plain_cpu_s_per_gib", row.plain_cpu_s_per_gib}});
  }
  KV_RETURN_IF_ERROR(WriteBenchRows(options.json, json));
  return 0;
}

Result<int> BenchService(const BenchOptions& options) {
  ServiceBenchOptions bench;
  bench.time_per_row = ToDuration(options.seconds_per_row);
  KV_ASSIGN_OR_RETURN(const std::vector<ServiceBenchRow> rows, RunServiceBench(bench));
  std::printf("%-9s %-7s %8s %9s %4s %10s %10s %12s\n", "transport", "op", "stored", "bytes", "out",
              "p50 us", "p99 us", "rate");
  Json json = Json::array();
  for (const ServiceBenchRow& row : rows) {
    const bool lookup = row.op == "lookup";
    const double units =
        lookup ? static_cast<double>(bench.chain) / 1e6 : static_cast<double>(row.size_bytes) / 1e9;
    std::printf("%-9s %-7s %8zu %9llu %4zu %10.1f %10.1f %7.2f %s\n",
                std::string(row.transport).c_str(), std::string(row.op).c_str(), row.stored,
                static_cast<unsigned long long>(row.size_bytes), row.outstanding, row.us_p50,
                row.us_p99, row.per_s * units, lookup ? "M keys/s" : "GB/s");
    json.push_back({{"transport", row.transport},
                    {"op", row.op},
                    {"stored_blocks", row.stored},
                    {"chain", lookup ? bench.chain : 0},
                    {"size_bytes", row.size_bytes},
                    {"outstanding", row.outstanding},
                    {"per_s", row.per_s},
                    {"us_p50", row.us_p50},
                    {"us_p99", row.us_p99}});
  }
  KV_RETURN_IF_ERROR(WriteBenchRows(options.json, json));
  return 0;
}

Result<int> BenchKernels(const BenchOptions& options) {
  KV_RETURN_IF_ERROR(kernels::ChooseImplementation());
  KV_RETURN_IF_ERROR(kernels::LoadBlas());
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  const Duration each = ToDuration(options.seconds_per_row / 2);
  std::printf("%s, kernels for %s, OpenBLAS core type %s, %s\n", kernels::CpuName().c_str(),
              std::string(kernels::ActiveImplementation().name).c_str(),
              kernels::BlasCoreType().c_str(), std::string(kernels::CompilerName()).c_str());
  std::printf("%-12s %-6s %9s %6s %8s %8s %9s %9s %7s %10s %s\n", "kernel", "codec", "head dim",
              "group", "context", "threads", "GB/s", "limit", "share", "tokens/s", "bound");
  Json rows = Json::array();
  // limit: bytes a second that are read or copied, whichever the kernel does.
  const auto add = [&](const char* kernel, const kernels::Codec& codec, const std::string& head_dim,
                       int group, int context, int threads, double rate, double limit,
                       double tokens, const char* bound) {
    std::printf("%-12s %-6s %9s %6d %8d %8d %9.2f %9.2f %6.0f%% %10.0f %s\n", kernel,
                std::string(codec.name).c_str(), head_dim.c_str(), group, context, threads,
                rate / 1e9, limit / 1e9, 100 * rate / limit, tokens, bound);
    rows.push_back({{"kernel", kernel},
                    {"isa", kernels::ActiveImplementation().name},
                    {"codec", codec.name},
                    {"head_dim", head_dim},
                    {"group", group},
                    {"context", context},
                    {"threads", threads},
                    {"gb_per_s", rate / 1e9},
                    {"read_gb_per_s", limit / 1e9},
                    {"tokens_per_s", tokens},
                    {"bound", bound}});
  };
  for (const KernelShape& shape : KernelShapes()) {
    for (const char* name : {"raw", "tile8", "tile4"}) {
      KV_ASSIGN_OR_RETURN(const kernels::Codec* codec, kernels::FindCodec(name));
      for (const int threads : {1, options.threads > 0 ? options.threads : cores}) {
        kernels::ThreadPool pool(threads);
        const kernels::AttentionRates rates = kernels::MeasureAttention(
            {codec, shape.state, shape.q_heads, shape.context, shape.layers}, &pool, each);
        const double read =
            kernels::MeasureRead(static_cast<size_t>(rates.step_bytes), &pool, each / 4).per_second;
        // Whichever is slower: reading as much, or attending as much that need not be read.
        const double arithmetic = rates.steps_in_cache * rates.step_bytes;
        add("attend", *codec, shape.name, shape.q_heads / shape.state.keys.kv_heads, shape.context,
            threads, rates.steps * rates.step_bytes, read, rates.steps,
            arithmetic < read ? "arithmetic" : "memory");
        if (threads == cores) break;
      }
    }
  }
  for (const int head_dim : {64, 128, 256}) {
    for (const char* name : {"tile8", "tile4"}) {
      KV_ASSIGN_OR_RETURN(const kernels::Codec* codec, kernels::FindCodec(name));
      constexpr size_t kWorkingSet = size_t{64} << 20;
      const kernels::TileRates rates =
          kernels::MeasureTile(*codec, {kBlockTokens, 4, head_dim}, codec->key_cuts,
                               codec->value_cuts, 4, 1, kWorkingSet, each / 4);
      const double copy = kernels::MeasureCopy(kWorkingSet, each / 4).per_second;
      const double token_bytes = 2.0 * 2 * 4 * head_dim;
      for (const bool encode : {true, false}) {
        const double rate = encode ? rates.encode : rates.decode;
        add(encode ? "tile_encode" : "tile_decode", *codec, std::to_string(head_dim), 1,
            kBlockTokens, 1, rate, copy, rate / token_bytes, "arithmetic");
      }
    }
  }
  for (const int threads : {1, options.threads > 0 ? options.threads : cores}) {
    kernels::ThreadPool pool(threads);
    BenchLinear(&pool, each, &rows);
    if (threads == cores) break;
  }
  KV_RETURN_IF_ERROR(WriteBenchRows(options.json, rows));
  return 0;
}

Result<int> BenchNode(const BenchOptions& options) {
  KV_RETURN_IF_ERROR(kernels::LoadBlas());
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  kernels::ThreadPool pool(options.threads > 0 ? options.threads : cores);
  KV_ASSIGN_OR_RETURN(const kernels::WeightForm form, ParseWeightForm(options.weights));
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(options.model, form));
  const NodeBench bench{model.get(), &pool, ToDuration(options.seconds_per_row)};
  const ModelConfig& config = model->config();
  Decoder decoder(model.get(), &pool);
  KV_ASSIGN_OR_RETURN(const double sgemm, SgemmRate(config, &pool, bench.each / 8));
  std::printf("kernels for %s, OpenBLAS core type %s, %d threads, weights %s (%s)\n",
              std::string(kernels::ActiveImplementation().name).c_str(),
              kernels::BlasCoreType().c_str(), pool.threads(), options.weights.c_str(),
              FormatBytes(static_cast<double>(model->weight_bytes())).c_str());
  std::printf("%-8s %-6s %8s %4s %10s %9s %9s %7s\n", "what", "codec", "context", "seq", "tokens/s",
              "rate", "limit", "share");
  Json rows = Json::array();
  for (const std::string& name : options.codecs) {
    KV_ASSIGN_OR_RETURN(const kernels::Codec* codec, kernels::FindCodec(name));
    const BlockClass block_class(model.get(), codec, {});
    // Prefill is computed beside sgemm.
    const auto add = [&](Json row) {
      row.update({{"codec", name},
                  {"threads", pool.threads()},
                  {"weights", options.weights},
                  {"kernels", kernels::ActiveImplementation().name}});
      const bool decodes = row["what"] == "decode";
      if (!decodes) row["sgemm_gflop_per_s"] = sgemm / 1e9;
      const auto number = [&](const char* key) { return row.value(key, 0.0); };
      const double rate = number(decodes ? "kv_gb_per_s" : "gflop_per_s");
      const double limit = number(decodes ? "read_gb_per_s" : "sgemm_gflop_per_s");
      std::printf("%-8s %-6s %8d %4d %10.1f %9.2f %9.2f %6.0f%% %s\n",
                  row["what"].get<std::string>().c_str(), name.c_str(), row["context"].get<int>(),
                  row.value("sequences", 1), number("tokens_per_s"), rate, limit,
                  100 * rate / limit, decodes ? "KV GB/s beside reads" : "GFLOP/s beside sgemm");
      rows.push_back(std::move(row));
    };
    for (const int length : options.prompts) {
      KV_ASSIGN_OR_RETURN(Json prompt, PromptRow(bench, block_class, &decoder, length));
      add(std::move(prompt));
    }
    for (const int asked : options.contexts) {
      // The longest context there is, where the model's is shorter.
      const int longest = (config.max_positions / kBlockTokens - 1) * kBlockTokens;
      const int context = std::min(asked / kBlockTokens * kBlockTokens, longest);
      KV_ASSIGN_OR_RETURN(Json prefill, PrefillRow(bench, block_class, &decoder, context));
      add(std::move(prefill));
      for (const int sequences : options.sequences) {
        KV_ASSIGN_OR_RETURN(Json decode,
                            DecodeRowOf(bench, block_class, &decoder, context, sequences));
        add(std::move(decode));
      }
      if (context == longest) break;
    }
  }
  KV_RETURN_IF_ERROR(WriteBenchRows(options.json, rows));
  return 0;
}

Result<int> ShowReport(const std::string& file, const std::string& baseline_file) {
  const auto load = [](const std::string& path) -> Result<Json> {
    KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    try {
      return Json::parse(text);
    } catch (const Json::exception& error) {
      return InvalidArgument("report '{}': not JSON: {}", path, error.what());
    }
  };
  KV_ASSIGN_OR_RETURN(const Json report, load(file));
  Json baseline;
  if (!baseline_file.empty()) {
    KV_ASSIGN_OR_RETURN(baseline, load(baseline_file));
  }
  KV_ASSIGN_OR_RETURN(const std::string page,
                      FormatReport(report, baseline_file.empty() ? nullptr : &baseline));
  std::fputs(page.c_str(), stdout);
  return 0;
}

}  // namespace kvant::node
