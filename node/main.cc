// The program `kvant`: reads the command line and hands over.
#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "node/bench_command.h"
#include "node/calibrate.h"
#include "node/eval_command.h"
#include "node/generate.h"
#include "node/klt_bench.h"
#include "node/klt_groups.h"
#include "node/logits_command.h"
#include "node/report.h"
#include "node/requests.h"
#include "node/resident_memory.h"
#include "node/run.h"
#include "node/tokenize_command.h"

namespace kvant::node {
namespace {

constexpr int kBadUsage = 2;
constexpr int kMaxThreads = 256;

// Prints an error where people look for it. Returns the exit status.
int Explain(const Status& status) {
  std::fprintf(stderr, "kvant: %s\n", status.message().c_str());
  return status.code() == StatusCode::kInvalidArgument ? kBadUsage : 1;
}

int ExitWith(const Result<int>& result) { return result.ok() ? *result : Explain(result.status()); }

// A size with its unit, as a flag.
void AddBytes(CLI::App* command, const std::string& flag, uint64_t* bytes,
              const std::string& help) {
  command
      ->add_option_function<std::string>(
          flag,
          [flag, bytes](const std::string& text) {
            const Result<uint64_t> parsed = ParseBytes(text);
            if (!parsed.ok()) throw CLI::ValidationError(flag, parsed.status().message());
            *bytes = *parsed;
          },
          help)
      ->type_name("SIZE");
}

// What is wrong with the first words, if they should name a command and don't.
std::string UnknownCommand(const CLI::App& app, int argc, char** argv) {
  const CLI::App* at = &app;
  for (int i = 1; i < argc && argv[i][0] != '-'; ++i) {
    const auto commands = at->get_subcommands([](const CLI::App*) { return true; });
    if (commands.empty()) return "";
    std::string names;
    const CLI::App* found = nullptr;
    for (const CLI::App* command : commands) {
      if (command->get_name() == argv[i]) found = command;
      names += (names.empty() ? "" : ", ") + command->get_name();
    }
    if (found == nullptr) return fmt::format("no command '{}': there are {}", argv[i], names);
    at = found;
  }
  return "";
}

// As a variable of a shell is that was never set.
CLI::Validator NotEmpty() {
  return {[](const std::string& text) {
            return std::string(text.empty() ? "give a value, or leave the option out" : "");
          },
          ""};
}

// A finite number, without CLI11's range of 300 digits in the error.
CLI::Validator Number(bool zero_too) {
  return {[zero_too](const std::string& text) {
            try {
              size_t end = 0;
              const double number = std::stod(text, &end);
              const bool fits = std::isfinite(number) && (zero_too ? number >= 0 : number > 0);
              if (fits && end == text.size()) return std::string();
            } catch (const std::exception&) {
            }
            return fmt::format("give a number {} 0, not '{}'", zero_too ? "of at least" : "above",
                               text);
          },
          "NUMBER"};
}
CLI::Validator AtLeastZero() { return Number(true); }
CLI::Validator AboveZero() { return Number(false); }

void AddWeights(CLI::App* command, std::string* weights) {
  command
      ->add_option("--weights", *weights,
                   "What products read: exact (bf16 where that loses no bit of a matrix, else "
                   "fp32), bf16, or int8 with a scale for each output")
      ->capture_default_str();
}

void AddNodeOptions(CLI::App* command, NodeOptions* node) {
  command->add_option("--model", node->model, "Hugging Face model directory, or a GGUF file")
      ->required();
  AddWeights(command, &node->weights);
  command
      ->add_option("--codec", node->codec,
                   "What is stored and attended: raw, raw-fp16, raw-fp32, tile8, tile4")
      ->capture_default_str();
  command
      ->add_option(
          "--store", node->store,
          "How that stands in the tier and travels: plain, lossless (raw in fewer bytes), or klt "
          "(by a codec pack)")
      ->capture_default_str();
  command->add_option("--pack", node->pack,
                      "Codec pack of --store klt (default: klt.safetensors beside the model)");
  command
      ->add_option(
          "--cuts", node->cuts,
          "Cuts of the pack that a block of --store klt holds: one, or such as refine each "
          "other, comma-separated; with --codec raw, 'exact' may stand behind them (default fine)")
      ->type_name("TEXT");
  command
      ->add_option(
          "--recompute", node->recompute,
          "Numbers of first layers, of those that the pack was made for, comma-separated: blocks "
          "of --store klt are also stored for readers who compute so many layers themselves "
          "(--max-kl chooses)")
      ->delimiter(',');
  command->add_option("--also", node->also,
                      "plain or lossless: blocks of --store klt also hold what is attended, for "
                      "readers over fast links (--max-kl chooses)");
  command
      ->add_option(
          "--wire", node->wire,
          "What decode reads of it: full, k8v4, k4v4, auto (by the link's rate), or one of --cuts "
          "(default full)")
      ->type_name("TEXT");
  command
      ->add_option(
          "--max-kl", node->max_kl,
          "The most that reading may cost, nats a token: of the cuts that keep it each fetch reads "
          "the one that gives the first token soonest")
      ->check(AtLeastZero());
  command->add_option("--domain", node->domains,
                      "DOMAIN=tenant,tenant,...: tenants that share blocks (default: each alone)");
  command->add_option("--secret-file", node->secret_file,
                      "Cluster secret: without it nobody can name a block");
  command
      ->add_option("--threads", node->threads,
                   "Compute threads (default 0: one a core; one under mpirun)")
      ->check(CLI::Range(0, kMaxThreads));
  command->add_option("--max-batch", node->max_batch, "Sequences under way at once")
      ->check(CLI::Range(1, kMaxDecodeRows))
      ->capture_default_str();
  AddBytes(command, "--local-cache", &node->local_cache_bytes,
           "Blocks kept in the node's own memory (default 256MiB)");
  AddBytes(command, "--arena", &node->tier_arena_bytes,
           "Memory for blocks on their way (default 64MiB)");
  command->add_flag("--no-shm", node->no_shm,
                    "Reach kvantd on this host over tcp as well, not over shared memory");
  command
      ->add_option("--tier-timeout", node->tier_timeout_s,
                   "Seconds until a shard that does not answer is given up")
      ->check(AboveZero())
      ->capture_default_str();
  command
      ->add_option("--fetch-budget-ms", node->fetch_budget_ms,
                   "--wire auto without --max-kl: reads the most that is fetched within this time")
      ->check(AboveZero())
      ->capture_default_str();
}

void AddEvalOptions(CLI::App* command, EvalOptions* eval) {
  command->add_option("--model", eval->model, "Hugging Face model directory, or a GGUF file")
      ->required();
  AddWeights(command, &eval->weights);
  command->add_option("--text", eval->text,
                      "Text that the model was not trained on (default: its own heldout.txt)");
  command->add_option("--texts", eval->texts,
                      "Folder with a subfolder of such texts for each kind, reported by itself");
  command->add_option("--pack", eval->pack,
                      "Codec pack, for the codec klt (default: klt.safetensors beside the model)");
  command->add_option("--calibration", eval->calibration,
                      "Texts that the baselines kvtc and aqua learn their tables from");
  command
      ->add_option("--codec", eval->codecs,
                   "What to compare, codecs and baselines (default raw,raw-fp32,tile8,tile4; exact "
                   "is always raw)")
      ->delimiter(',');
  command
      ->add_option("--wire", eval->wires,
                   "What is read of each: full, k8v4, k4v2, ... (default: all its cuts)")
      ->delimiter(',');
  command->add_option("--prefix", eval->prefix, "Tokens that come from the tier, a multiple of 64")
      ->capture_default_str();
  command->add_option("--suffix", eval->suffix, "Fresh tokens behind them")->capture_default_str();
  command
      ->add_option(
          "--windows", eval->windows,
          "Places of the text (default 0: as many as do not overlap, at most 16), or of each of "
          "--texts (default 0: 1)")
      ->check(CLI::Range(0, 1 << 16));
  command
      ->add_option("--passkey-samples", eval->passkey_samples, "Prompts for each length and depth")
      ->check(CLI::Range(0, 1 << 16))
      ->capture_default_str();
  command->add_flag("--no-passkey", eval->no_passkey, "Leave the passkey prompts out");
  command->add_flag("--no-class", eval->no_class,
                    "Leave out prefixes that are computed over their own encoded form");
  command->add_option("--json", eval->json, "File that the numbers go to");
  command->add_option("--svg", eval->svg, "File that the rate-distortion plot goes to");
  command->add_option("--threads", eval->threads, "Compute threads (default: one a core)")
      ->check(CLI::Range(0, kMaxThreads));
  command->add_option("--seed", eval->seed, "Of spans, prompts and resampling")
      ->capture_default_str();
}

void AddCalibrateOptions(CLI::App* command, CalibrateOptions* calibrate) {
  command->add_option("--model", calibrate->model, "Hugging Face model directory, or a GGUF file")
      ->required();
  command->add_option("--text", calibrate->texts, "Texts like those that will be served; a mixture")
      ->required();
  command->add_option("--out", calibrate->out, "File of the pack")->required();
  command->add_option("--weights", calibrate->weights,
                      "What errors cost, by scripts/calibrate-fisher (default: from attention)");
  command
      ->add_option("--recompute", calibrate->recompute,
                   "Numbers of layers that a reader may recompute, besides none; 0: only none "
                   "(default: a third of the model's)")
      ->delimiter(',');
  command
      ->add_option("--group-width", calibrate->group_width,
                   "Numbers of a token that one transform takes together at most: fewer are coded "
                   "sooner, more take fewer bytes")
      ->check(CLI::Range(1, kKltMostGroupWidth))
      ->capture_default_str();
  command->add_option("--tokens", calibrate->tokens, "Of all texts, the same share of each")
      ->check(CLI::Range(1024, 1 << 24))
      ->capture_default_str();
  command->add_option("--length", calibrate->length, "Tokens of a sequence")
      ->check(CLI::Range(64, 1 << 20))
      ->capture_default_str();
  command->add_option("--threads", calibrate->threads, "Compute threads (default: one a core)")
      ->check(CLI::Range(0, kMaxThreads));
  command->add_option("--seed", calibrate->seed, "Of what is sampled")->capture_default_str();
}

int Main(int argc, char** argv) {
  // Answers go to stdout, everything else does not.
  spdlog::set_default_logger(spdlog::stderr_color_mt("kvant"));
  spdlog::set_pattern("%H:%M:%S.%e %^%l%$ %v");

  CLI::App app{
      "Kvant: LLM inference over one shared, compressed KV cache.\n"
      "  kvant generate --model models/gqa-5m --prompt 'import os'\n"
      "  mpirun -np 4 kvant run --roles cache=2,prefill=1,decode=1 --model models/gqa-5m \\\n"
      "      --requests examples/requests.jsonl --answers out.jsonl --report report.json"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "kvant " KVANT_VERSION);
  std::string log_level = "warn";
  app.add_option("--log-level", log_level, "trace, debug, info, warn, error, off")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error", "off"}))
      ->capture_default_str();
  app.fallthrough();

  RunOptions run;
  CLI::App* run_command = app.add_subcommand(
      "run", "Answer a file of requests (OpenAI batch format), alone or under mpirun");
  AddNodeOptions(run_command, &run.node);
  run_command->add_option("--requests", run.requests, "One JSON object a line")->required();
  run_command->add_option("--answers", run.answers, "File that the answers go to");
  run_command->add_option("--report", run.report, "File that the report goes to, as JSON");
  run_command->add_option("--roles", run.roles,
                          "Ranks of each role, e.g. cache=2,prefill=1,decode=1 (under mpirun)");
  run_command
      ->add_option("--transport", run.transport,
                   "Between ranks of mpirun: mpi, tcp, shm (and tcp between hosts), verbs or auto")
      ->capture_default_str();
  run_command
      ->add_option(
          "--cache", run.cache,
          "kvantd shards: tcp://HOST:PORT,... or verbs://... (default: in this process, or the "
          "cache ranks under mpirun)")
      ->check(NotEmpty());
  run_command->add_flag("--no-cache", run.no_cache, "Compute every prompt whole");
  AddBytes(run_command, "--cache-memory", &run.cache_memory_bytes,
           "Of each shard that this run hosts (default 512MiB)");
  run_command->add_option("--reference", run.reference,
                          "Answers to compare with (same codec, without cache)");
  run_command->add_option("--raw-reference", run.raw_reference,
                          "Answers of the raw codec to compare with");
  run_command->add_option("--teacher", run.teacher,
                          "Answers whose tokens are fed, to count where the most likely agrees");

  GenerateOptions generate;
  std::string prompt_file;
  generate.request.max_tokens = 64;
  generate.request.temperature = 0;
  generate.request.custom_id = "prompt";
  CLI::App* generate_command = app.add_subcommand("generate", "Continue one prompt");
  AddNodeOptions(generate_command, &generate.node);
  auto* prompt = generate_command->add_option("--prompt", generate.request.prompt, "Text");
  generate_command->add_option("--prompt-file", prompt_file, "File with the text")
      ->excludes(prompt);
  generate_command->add_option("--max-tokens", generate.request.max_tokens, "Tokens at most")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  generate_command
      ->add_option("--temperature", generate.request.temperature, "0 takes the most likely token")
      ->check(CLI::Range(0.0, 2.0))
      ->capture_default_str();
  generate_command->add_option("--top-p", generate.request.top_p, "Nucleus sampling")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  generate_command->add_option("--seed", generate.request.seed, "Of the sampling")
      ->capture_default_str();
  generate_command->add_option("--stop", generate.request.stop, "Text that ends the answer");
  generate_command->add_option("--tenant", generate.request.tenant, "Whose blocks these are");
  generate_command
      ->add_option("--cache", generate.cache,
                   "kvantd shards: tcp://HOST:PORT,... or verbs://... (default: in this process)")
      ->check(NotEmpty());
  generate_command->add_flag("--no-cache", generate.no_cache, "Compute the prompt whole");
  AddBytes(generate_command, "--cache-memory", &generate.cache_memory_bytes,
           "Of the shard in this process (default 512MiB)");
  generate_command->add_flag("--json", generate.json, "Print one JSON object");

  EvalOptions eval;
  CLI::App* eval_command = app.add_subcommand(
      "eval", "What compression costs: KL, perplexity, recall against bits per element");
  AddEvalOptions(eval_command, &eval);
  CalibrateOptions calibrate;
  CLI::App* calibrate_command =
      app.add_subcommand("calibrate", "Make a model's codec pack, by forward passes over text");
  AddCalibrateOptions(calibrate_command, &calibrate);

  TokenizeOptions tokenize;
  CLI::App* tokenize_command = app.add_subcommand("tokenize", "Print the token ids of a text");
  tokenize_command
      ->add_option("--model", tokenize.model, "Hugging Face model directory, or a GGUF file")
      ->required();
  auto* tokenize_text = tokenize_command->add_option("--text", tokenize.text, "Text");
  auto* tokenize_file =
      tokenize_command->add_option("--text-file", tokenize.text_file, "File with the text");
  tokenize_text->excludes(tokenize_file);
  tokenize_command->add_flag("!--no-special", tokenize.add_special,
                             "Leave out what the tokenizer puts around a text (BOS, EOS)");
  tokenize_command->add_flag("--json", tokenize.json, "Print a list of ids and pieces");

  std::string report_in;
  std::string baseline_in;
  CLI::App* report_command = app.add_subcommand("report", "Show the report of a run");
  report_command->add_option("--json-in", report_in, "Written by kvant run --report")->required();
  report_command->add_option("--baseline-report", baseline_in,
                             "Report of the same requests without cache");

  LogitsOptions logits;
  CLI::App* logits_command = app.add_subcommand("logits", "Write what a model says to tokens");
  logits_command
      ->add_option("--model", logits.model, "Hugging Face model directory, or a GGUF file")
      ->required();
  AddWeights(logits_command, &logits.weights);
  auto* tokens = logits_command->add_option("--tokens", logits.tokens, "Token ids: 1,2,3");
  logits_command->add_option("--tokens-file", logits.tokens_file, "File with the ids")
      ->excludes(tokens);
  logits_command->add_option("--dtype", logits.dtype, "Of the keys and values attended")
      ->check(CLI::IsMember({"fp32", "bf16"}))
      ->capture_default_str();
  logits_command->add_option("--codec", logits.codec, "What they are stored as, in place of that");
  logits_command->add_option("--out", logits.out, "NPY file: fp32 [tokens][vocabulary]")
      ->required();
  logits_command->add_option("--threads", logits.threads, "Compute threads (default: one a core)")
      ->check(CLI::Range(0, kMaxThreads));

  CLI::App* bench_command = app.add_subcommand("bench", "Measure this machine");
  bench_command->require_subcommand(1);
  BenchOptions bench;
  CLI::App* bench_transport = bench_command->add_subcommand(
      "transport", "Latency and throughput of every backend beside a plain loop");
  CLI::App* bench_kernels = bench_command->add_subcommand(
      "kernels", "Attention and tiles beside streaming reads and copies");
  CLI::App* bench_service = bench_command->add_subcommand(
      "service", "Lookups, gets and puts at one shard, in the process, over shm and tcp");
  CLI::App* bench_node =
      bench_command->add_subcommand("node", "Prefill beside sgemm, decode beside plain reads");
  CLI::App* bench_verbs =
      bench_command->add_subcommand("verbs", "The verbs backend alone, beside plain RDMA");
  for (CLI::App* command :
       {bench_transport, bench_verbs, bench_service, bench_kernels, bench_node}) {
    command->add_option("--json", bench.json, "File that the rows go to");
    command->add_option("--seconds", bench.seconds_per_row, "Time for each row")
        ->check(AboveZero())
        ->capture_default_str();
  }
  bench_transport->add_option("--backend", bench.backends,
                              "loopback, shm, tcp, verbs or mpi (default: all that can be used)");
  for (CLI::App* command : {bench_transport, bench_verbs}) {
    command->add_option("--poll-us", bench.poll_us, "Polling before our sides sleep")
        ->check(AtLeastZero())
        ->capture_default_str();
    command->add_option("--bytes", bench.sizes_bytes, "Sizes of transfers")
        ->delimiter(',')
        ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 30))
        ->capture_default_str();
  }
  bench_node->add_option("--model", bench.model, "Hugging Face model directory, or a GGUF file")
      ->required();
  AddWeights(bench_node, &bench.weights);
  bench_node->add_option("--codec", bench.codecs, "What is stored and attended")
      ->delimiter(',')
      ->capture_default_str();
  bench_node->add_option("--context", bench.contexts, "Tokens that are attended")
      ->check(CLI::Range(kBlockTokens, 1 << 20))
      ->delimiter(',')
      ->capture_default_str();
  bench_node->add_option("--sequences", bench.sequences, "How many decode at once")
      ->check(CLI::Range(1, kMaxDecodeRows))
      ->delimiter(',')
      ->capture_default_str();
  bench_node->add_option("--prompt", bench.prompts, "Also prompts of so many tokens, whole")
      ->check(CLI::Range(1, 1 << 20))
      ->delimiter(',');
  for (CLI::App* command : {bench_kernels, bench_node})
    command->add_option("--threads", bench.threads, "Compute threads (default: one a core)");
  KltBenchOptions bench_klt;
  CLI::App* bench_klt_command =
      bench_command->add_subcommand("klt", "A codec pack's speed beside prefill, on one core");
  bench_klt_command
      ->add_option("--model", bench_klt.model, "Hugging Face model directory, or a GGUF file")
      ->required();
  bench_klt_command->add_option("--pack", bench_klt.pack,
                                "Codec pack (default: klt.safetensors beside the model)");
  bench_klt_command->add_option("--text", bench_klt.text, "Text to code")->required();
  bench_klt_command->add_option("--tokens", bench_klt.tokens, "Of the text, a multiple of 64")
      ->check(CLI::Range(kBlockTokens, 1 << 20))
      ->capture_default_str();
  bench_klt_command->add_option("--json", bench_klt.json, "File that the rows go to");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (const std::string unknown = UnknownCommand(app, argc, argv); !unknown.empty()) {
      std::fprintf(stderr, "kvant: %s\n", unknown.c_str());
      return kBadUsage;
    }
    return app.exit(error) == 0 ? 0 : kBadUsage;
  }
  spdlog::set_level(spdlog::level::from_str(log_level));

  if (run_command->parsed()) return ExitWith(RunRequests(run, &argc, &argv));
  if (generate_command->parsed()) {
    if (!prompt_file.empty()) {
      Result<std::string> text = ReadFile(prompt_file);
      if (!text.ok()) return Explain(text.status());
      generate.request.prompt = *std::move(text);
    } else if (prompt->empty()) {
      return Explain(InvalidArgument("nothing to continue: give --prompt or --prompt-file"));
    }
    return ExitWith(Generate(generate));
  }
  if (bench_klt_command->parsed()) return ExitWith(BenchKlt(bench_klt));
  if (logits_command->parsed()) return ExitWith(WriteLogits(logits));
  if (calibrate_command->parsed()) return ExitWith(Calibrate(calibrate));
  if (eval_command->parsed()) return ExitWith(Eval(eval));
  if (tokenize_command->parsed()) {
    if (tokenize_text->empty() && tokenize_file->empty()) {
      return Explain(InvalidArgument("nothing to tokenize: give --text or --text-file"));
    }
    return ExitWith(Tokenize(tokenize));
  }
  if (report_command->parsed()) return ExitWith(ShowReport(report_in, baseline_in));
  if (bench_service->parsed()) return ExitWith(BenchService(bench));
  if (bench_kernels->parsed()) return ExitWith(BenchKernels(bench));
  if (bench_verbs->parsed()) bench.backends = {"verbs"};
  if (bench_transport->parsed() || bench_verbs->parsed())
    return ExitWith(BenchTransport(bench, &argc, &argv));
  return ExitWith(BenchNode(bench));
}

}  // namespace
}  // namespace kvant::node

int main(int argc, char** argv) {
  kvant::node::KeepFreedMemory();
  return kvant::node::Main(argc, argv);
}
