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

// rows: an array, each of which gets what every row says.
Status WriteRows(const std::string& path, Json rows) {
  for (Json& row : rows) {
    row["cpu"] = kernels::CpuName();
    row["openblas_core_type"] = kernels::BlasCoreType();
    row["compiler"] = kernels::CompilerName();
  }
  return path.empty() ? OkStatus() : WriteFile(path, rows.dump(2) + "\n");
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

// Operations that one query token spends on one token that it attends.
double AttentionOperations(const ModelConfig& config) {
  const kernels::LayerShape state = config.StateShape(1);
  return 2.0 * config.q_heads * (kernels::KeyDim(state) + state.values.head_dim);
}

double Operations(const kernels::GemmShape& shape) {
  return 2.0 * shape.rows * shape.out_features * shape.in_features;
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

// Runs `once` for at least this long after one round that is not counted. Seconds of one round.
template <typename Once>
Result<double> TimeOf(Duration at_least, const Once& once) {
  KV_RETURN_IF_ERROR(once());
  const TimePoint started = SteadyClock().Now();
  int rounds = 0;
  while (SteadyClock().Now() - started < at_least) {
    KV_RETURN_IF_ERROR(once());
    ++rounds;
  }
  return Seconds(SteadyClock().Now() - started) / std::max(rounds, 1);
}

struct NodeBench {
  const Model* model;
  kernels::ThreadPool* pool;
  Duration each;
};

Result<Json> PrefillRow(const NodeBench& bench, const BlockClass& block_class, Decoder* decoder,
                        int context, double sgemm_rate) {
  const ModelConfig& config = bench.model->config();
  const std::vector<CachedBlockPtr> blocks = RandomPast(block_class, context);
  BlockPast past(block_class, blocks, block_class.FullCuts(), nullptr);
  const std::vector<int32_t> tokens(kBlockTokens, 1);
  const LayerSink sink = [](int, const float*, const float*) { return OkStatus(); };
  // The logits are left out, as in the prefill of all blocks but a prompt's last tokens.
  KV_ASSIGN_OR_RETURN(const double seconds, TimeOf(bench.each, [&] {
                        return decoder->Prefill({tokens, context, &past}, sink, nullptr);
                      }));
  double dense = 0;
  for (const kernels::GemmShape& shape : LayerShapes(config)) dense += Operations(shape);
  const double attention =
      kBlockTokens * (context + kBlockTokens / 2.0) * AttentionOperations(config);
  // The last layer ends with its keys and values.
  const double operations = (dense + attention) * (config.layers - 1) +
                            static_cast<double>(kBlockTokens) * config.hidden *
                                static_cast<double>(block_class.Bf16BytesPerToken()) /
                                config.layers;
  return Json{{"what", "prefill"},
              {"codec", block_class.codec().name},
              {"context", context},
              {"threads", bench.pool->threads()},
              {"tokens_per_s", kBlockTokens / seconds},
              {"gflop_per_s", operations / seconds / 1e9},
              {"sgemm_gflop_per_s", sgemm_rate / 1e9}};
}

Result<Json> DecodeRowOf(const NodeBench& bench, const BlockClass& block_class, Decoder* decoder,
                         int context) {
  const ModelConfig& config = bench.model->config();
  const std::vector<CachedBlockPtr> blocks = RandomPast(block_class, context);
  BlockPast past(block_class, blocks, block_class.FullCuts(), nullptr);
  OpenTile open(config);
  std::vector<float> logits(static_cast<size_t>(config.vocab));
  KV_ASSIGN_OR_RETURN(const double seconds, TimeOf(bench.each, [&] {
                        open.Clear();
                        DecodeRow row;
                        row.position = context;
                        row.past = &past;
                        row.open = &open;
                        decoder->DecodeStep(std::span(&row, 1), logits.data());
                        return row.status;
                      }));
  const double kv_bytes = static_cast<double>(block_class.payload_bytes() * blocks.size());
  const kernels::Rate read = kernels::MeasureRead(static_cast<size_t>(std::max(kv_bytes, 65536.0)),
                                                  bench.pool, bench.each / 4);
  return Json{{"what", "decode"},
              {"codec", block_class.codec().name},
              {"context", context},
              {"threads", bench.pool->threads()},
              {"tokens_per_s", 1 / seconds},
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

}  // namespace

Result<int> BenchTransport(const BenchOptions& options, int* argc, char*** argv) {
  TransportBenchOptions bench;
  bench.backends = options.backends;
  bench.sizes_bytes = options.sizes_bytes;
  bench.time_per_row = ToDuration(options.seconds_per_row);
  std::unique_ptr<MpiSession> session;
  if (MpiSession::LaunchedByMpi()) {
    KV_ASSIGN_OR_RETURN(session, MpiSession::Create(argc, argv));
    bench.mpi = session.get();
  }
  KV_ASSIGN_OR_RETURN(const std::vector<TransportBenchRow> rows, RunTransportBench(bench));
  if (session != nullptr && session->rank() != 0) return 0;
  Json json = Json::array();
  std::printf("%-9s %-4s %9s %4s %10s %10s %8s %8s %7s %9s\n", "backend", "op", "bytes", "out",
              "p50 us", "p99 us", "GB/s", "plain", "ratio", "cpu s/GiB");
  for (const TransportBenchRow& row : rows) {
    std::printf("%-9s %-4s %9llu %4u %10.1f %10.1f %8.2f %8.2f %6.0f%% %9.3f\n",
                row.backend.c_str(), row.op.c_str(),
                static_cast<unsigned long long>(row.size_bytes), row.outstanding,
                row.latency_us_p50, row.latency_us_p99, row.gb_per_s, row.plain_gb_per_s,
                100 * row.gb_per_s / row.plain_gb_per_s, row.cpu_s_per_gib);
    json.push_back({{"backend", row.backend},
                    {"op", row.op},
                    {"size_bytes", row.size_bytes},
                    {"outstanding", row.outstanding},
                    {"latency_us_p50", row.latency_us_p50},
                    {"latency_us_p99", row.latency_us_p99},
                    {"gb_per_s", row.gb_per_s},
                    {"cpu_s_per_gib", row.cpu_s_per_gib},
                    {"plain_gb_per_s", row.plain_gb_per_s},
                    {"plain_latency_us_p50", row.plain_latency_us_p50}});
  }
  KV_RETURN_IF_ERROR(WriteRows(options.json, json));
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
  KV_RETURN_IF_ERROR(WriteRows(options.json, json));
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
  KV_RETURN_IF_ERROR(WriteRows(options.json, rows));
  return 0;
}

Result<int> BenchNode(const BenchOptions& options) {
  KV_RETURN_IF_ERROR(kernels::LoadBlas());
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  kernels::ThreadPool pool(options.threads > 0 ? options.threads : cores);
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(options.model));
  const NodeBench bench{model.get(), &pool, ToDuration(options.seconds_per_row)};
  const ModelConfig& config = model->config();
  Decoder decoder(model.get(), &pool);
  KV_ASSIGN_OR_RETURN(const double sgemm, SgemmRate(config, &pool, bench.each / 8));
  std::printf("kernels for %s, OpenBLAS core type %s, %d threads\n",
              std::string(kernels::ActiveImplementation().name).c_str(),
              kernels::BlasCoreType().c_str(), pool.threads());
  std::printf("%-8s %-6s %8s %10s %9s %9s %9s %9s %7s\n", "what", "codec", "context", "tokens/s",
              "GFLOP/s", "sgemm", "KV GB/s", "read", "ratio");
  Json rows = Json::array();
  for (const char* name : {"raw", "tile8", "tile4"}) {
    KV_ASSIGN_OR_RETURN(const kernels::Codec* codec, kernels::FindCodec(name));
    const BlockClass block_class(model.get(), codec, {});
    for (const int asked : {512, 1024, 4096}) {
      // The longest context there is, where the model's is shorter.
      const int longest = (config.max_positions / kBlockTokens - 1) * kBlockTokens;
      const int context = std::min(asked, longest);
      KV_ASSIGN_OR_RETURN(Json prefill, PrefillRow(bench, block_class, &decoder, context, sgemm));
      const double flops = prefill["gflop_per_s"].get<double>();
      std::printf("%-8s %-6s %8d %10.0f %9.1f %9.1f %9s %9s %6.0f%%\n", "prefill", name, context,
                  prefill["tokens_per_s"].get<double>(), flops, sgemm / 1e9, "", "",
                  100 * flops * 1e9 / sgemm);
      KV_ASSIGN_OR_RETURN(Json decode, DecodeRowOf(bench, block_class, &decoder, context));
      const double kv = decode["kv_gb_per_s"].get<double>();
      const double read = decode["read_gb_per_s"].get<double>();
      std::printf("%-8s %-6s %8d %10.0f %9s %9s %9.2f %9.2f %6.0f%%\n", "decode", name, context,
                  decode["tokens_per_s"].get<double>(), "", "", kv, read, 100 * kv / read);
      for (Json* row : {&prefill, &decode}) {
        (*row)["kernels"] = kernels::ActiveImplementation().name;
        rows.push_back(*row);
      }
      if (context == longest) break;
    }
  }
  KV_RETURN_IF_ERROR(WriteRows(options.json, rows));
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
