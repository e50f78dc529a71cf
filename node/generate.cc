#include "node/generate.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "node/report.h"
#include "node/resident_memory.h"
#include "node/scheduler.h"
#include "node/tier_session.h"

namespace kvant::node {

Result<int> Generate(const GenerateOptions& options) {
  KV_ASSIGN_OR_RETURN(
      const std::unique_ptr<TierSession> session,
      TierSession::Open(options.node, options.cache, options.no_cache, options.cache_memory_bytes));
  NodeRuntime& node = session->node();
  SchedulerOptions scheduling = node.MakeSchedulerOptions();
  // Somebody may go on from here: what was generated is stored too, after it was printed.
  scheduling.store_all_answers = !options.cache.empty();
  Scheduler scheduler(&node.block_class(), &node.supply(), node.tier(), nullptr, &node.decoder(),
                      &node.clock(), &node.domains(), scheduling);
  if (!options.json) {
    scheduler.SetListener([](const std::string&, std::string_view text) {
      std::fwrite(text.data(), 1, text.size(), stdout);
      std::fflush(stdout);
    });
  }
  scheduler.Submit(options.request);
  std::vector<Answer> answers;
  const auto step = [&] {
    if (!scheduler.Step() && node.tier() != nullptr) {
      node.tier()->Wait(std::chrono::microseconds(200));
    }
  };
  while (answers.empty()) {
    step();
    answers = scheduler.TakeAnswers();
  }
  const Answer& answer = answers.front();
  if (!answer.error.ok()) return answer.error;

  const SchedulerStats& stats = scheduler.stats();
  const uint64_t hit_tokens = stats.cached_tokens - stats.recomputed_tokens;
  const uint64_t fetched = node.tier() != nullptr ? node.tier()->stats().fetched_bytes : 0;
  if (options.json) {
    const nlohmann::json result = {
        {"text", answer.text},
        {"tokens", answer.tokens},
        {"finish_reason", answer.finish == FinishReason::kLength ? "length" : "stop"},
        {"prompt_tokens", answer.prompt_tokens},
        {"hit_tokens", hit_tokens},
        {"recomputed_tokens", static_cast<uint64_t>(answer.prompt_tokens) - hit_tokens},
        {"fetched_bytes", fetched},
        {"transport", session->transport_name()},
        {"ttft_ms", Milliseconds(answer.ttft)},
        {"tpot_ms", Milliseconds(answer.tpot)},
        {"peak_resident_bytes", PeakResidentBytes()},
        {"weights", options.node.weights},
        {"weight_bytes", node.model().weight_bytes()}};
    std::puts(result.dump(2, ' ', false, nlohmann::json::error_handler_t::replace).c_str());
  } else {
    std::puts("");
    std::fflush(stdout);
    std::fprintf(
        stderr,
        "kvant: %llu of %d prompt tokens found in the cache (%s fetched over %s), %llu computed; "
        "first token after %.1f ms, then %.2f ms each; resident memory: %s at its peak\n",
        static_cast<unsigned long long>(hit_tokens), answer.prompt_tokens,
        FormatBytes(static_cast<double>(fetched)).c_str(),
        std::string(session->transport_name()).c_str(),
        static_cast<unsigned long long>(static_cast<uint64_t>(answer.prompt_tokens) - hit_tokens),
        Milliseconds(answer.ttft), Milliseconds(answer.tpot),
        FormatBytes(static_cast<double>(PeakResidentBytes())).c_str());
    if (answer.finish == FinishReason::kLength &&
        static_cast<int>(answer.tokens.size()) < options.request.max_tokens) {
      std::fprintf(stderr, "kvant: it ends there because the model's context is full\n");
    }
  }
  while (!scheduler.idle()) step();
  node.Drain();
  return 0;
}

}  // namespace kvant::node
