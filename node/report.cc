#include "node/report.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "kernels/implementation.h"
#include "node/resident_memory.h"

namespace kvant::node {
namespace {

using Json = nlohmann::json;

Json CountersJson(const LinkCounters& counters) {
  return {{"control_bytes_sent", counters.control_bytes_sent},
          {"control_bytes_received", counters.control_bytes_received},
          {"payload_bytes_sent", counters.payload_bytes_sent},
          {"payload_bytes_received", counters.payload_bytes_received},
          {"messages_sent", counters.messages_sent},
          {"transfers_submitted", counters.transfers_submitted}};
}

// The value below which a share of the values lies; 0 of none.
double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(share * static_cast<double>(values.size())) - 1;
  return values[static_cast<size_t>(std::clamp(rank, 0.0, static_cast<double>(values.size() - 1)))];
}

uint64_t Sum(std::span<const Json> ranks, const char* group, const char* field) {
  uint64_t sum = 0;
  for (const Json& rank : ranks) {
    if (rank.contains(group)) sum += rank[group].value(field, uint64_t{0});
  }
  return sum;
}

// Bytes of one kind of link: what ranks of `role` sent to the shards, or received from them.
Json TierLink(std::span<const Json> ranks, Role role, bool to_cache) {
  uint64_t payload = 0;
  uint64_t control = 0;
  for (const Json& rank : ranks) {
    if (rank.at("role") != RoleName(role)) continue;
    const Json& tier = rank.at("tier_link");
    payload += tier.at(to_cache ? "payload_bytes_sent" : "payload_bytes_received").get<uint64_t>();
    control += tier.at(to_cache ? "control_bytes_sent" : "control_bytes_received").get<uint64_t>();
  }
  return {{"payload_bytes", payload}, {"control_bytes", control}};
}

Json Links(std::span<const Json> ranks) {
  const Json nodes = {{"payload_bytes", Sum(ranks, "node_link", "payload_bytes_sent")},
                      {"control_bytes", Sum(ranks, "node_link", "control_bytes_sent")}};
  return {{"prefill_to_cache", TierLink(ranks, Role::kPrefill, true)},
          {"cache_to_prefill", TierLink(ranks, Role::kPrefill, false)},
          {"decode_to_cache", TierLink(ranks, Role::kDecode, true)},
          {"cache_to_decode", TierLink(ranks, Role::kDecode, false)},
          {"node_to_node", nodes}};
}

// A number for each of the ways to read, by name.
Json ByCut(const BlockClass& block_class, const std::function<Json(size_t choice)>& value) {
  Json numbers = Json::object();
  for (size_t i = 0; i < block_class.choices().size(); ++i) {
    numbers[block_class.choices()[i].name] = value(i);
  }
  return numbers;
}

// What plans did, of all ranks.
Json PlansOf(std::span<const Json> ranks) {
  double forecast_error = 0;
  uint64_t outcomes = 0;
  std::map<std::string, uint64_t> by_cut;
  for (const Json& rank : ranks) {
    if (!rank.contains("planner")) continue;
    const Json& plans = rank["planner"];
    const uint64_t count = plans.at("outcomes").get<uint64_t>();
    forecast_error += plans.at("mean_forecast_error").get<double>() * static_cast<double>(count);
    outcomes += count;
    for (const auto& [cut, fetches] : plans.at("fetch_plans_by_cut").items()) {
      by_cut[cut] += fetches.get<uint64_t>();
    }
  }
  const double mean = outcomes == 0 ? 0 : forecast_error / static_cast<double>(outcomes);
  return {{"fetch_plans", Sum(ranks, "planner", "fetch_plans")},
          {"fetch_plans_by_cut", by_cut},
          {"compute_plans", Sum(ranks, "planner", "compute_plans")},
          {"mean_forecast_error", mean}};
}

// Requests whose prompt the tier had at least half of when it was asked, whether it was fetched
// then or computed.
Json TierHits(std::span<const Answer> answers) {
  std::vector<double> ttft;
  double sum = 0;
  uint64_t fetched = 0;
  for (const Answer& answer : answers) {
    if (!answer.error.ok() || answer.tier_tokens == 0) continue;
    if (2 * answer.tier_tokens < answer.prompt_tokens) continue;
    ttft.push_back(Milliseconds(answer.ttft));
    sum += ttft.back();
    fetched += answer.fetched_tokens > 0 ? 1 : 0;
  }
  const size_t requests = ttft.size();
  return {{"requests", requests},
          {"fetched_requests", fetched},
          {"ttft_ms_p50", Percentile(ttft, 0.5)},
          {"ttft_ms_mean", requests == 0 ? 0 : sum / static_cast<double>(requests)}};
}

struct Agreement {
  int identical = 0;
  int compared = 0;
};

Agreement CountIdentical(std::span<const Answer> answers, const std::vector<Answer>& reference) {
  std::map<std::string_view, const Answer*> by_id;
  for (const Answer& answer : reference) by_id[answer.custom_id] = &answer;
  Agreement agreement;
  for (const Answer& answer : answers) {
    const auto found = by_id.find(answer.custom_id);
    if (found == by_id.end()) continue;
    ++agreement.compared;
    const Answer& other = *found->second;
    if (answer.error.ok() == other.error.ok() && answer.tokens == other.tokens &&
        answer.text == other.text && answer.finish == other.finish) {
      ++agreement.identical;
    }
  }
  return agreement;
}

// "12 fetched (coarse 9, fine 3), 4 computed; forecasts 18 % off on average", or nothing.
std::string PlansLine(const Json& plans) {
  const double fetched = plans.at("fetch_plans").get<double>();
  const double computed = plans.at("compute_plans").get<double>();
  if (fetched + computed == 0) return "";
  std::string by_cut;
  for (const auto& [cut, count] : plans.at("fetch_plans_by_cut").items()) {
    if (count == 0) continue;
    by_cut += fmt::format("{}{} {:.0f}", by_cut.empty() ? "" : ", ", cut, count.get<double>());
  }
  std::string line = fmt::format("{:.0f} fetched{}, {:.0f} computed", fetched,
                                 by_cut.empty() ? "" : " (" + by_cut + ")", computed);
  // The first ones are guesses, before anything was measured.
  constexpr double kFewPlans = 8;
  if (fetched + computed >= kFewPlans) {
    line += fmt::format("; forecasts {:.0f} % off on average",
                        100 * plans.at("mean_forecast_error").get<double>());
  }
  return line;
}

double Ratio(double numerator, double denominator) {
  return denominator == 0 ? 0 : numerator / denominator;
}

}  // namespace

std::string FormatBytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit + 1 < std::size(kUnits)) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.2f} {}", bytes, kUnits[unit]);
}

Json NodeRankReport(int rank, Role role, const std::string& host, NodeRuntime& node,
                    const SchedulerStats& scheduler, const LinkCounters& tier,
                    const LinkCounters& nodes) {
  const SupplyStats& supply = node.supply().stats();
  const BlockClass& blocks = node.block_class();
  const PlannerStats& plans = node.planner().stats();
  const MeasuredRates& rates = node.planner().rates();
  const Json fetch_plans = ByCut(blocks, [&](size_t i) { return plans.fetch_plans_at[i]; });
  const Json decode_rates = ByCut(blocks, [&](size_t i) {
    return rates.decode_tokens_per_s[blocks.DecodeDepth(blocks.choices()[i].cuts)];
  });
  const TierStats link = node.tier() != nullptr ? node.tier()->stats() : TierStats{};
  return {{"rank", rank},
          {"role", RoleName(role)},
          {"host", host},
          {"tier_link", CountersJson(tier)},
          {"node_link", CountersJson(nodes)},
          {"threads", node.threads()},
          {"kernels", kernels::ActiveImplementation().name},
          {"peak_resident_bytes", PeakResidentBytes()},
          {"weight_bytes", blocks.model().weight_bytes()},
          {"scheduler",
           {{"prompt_tokens", scheduler.prompt_tokens},
            {"hit_tokens", scheduler.cached_tokens},
            {"local_hit_tokens", scheduler.local_hit_tokens},
            {"tier_hit_tokens", scheduler.tier_hit_tokens},
            {"generated_tokens", scheduler.generated_tokens},
            {"recomputed_after_failure_tokens", scheduler.recomputed_tokens},
            {"tail_tokens", scheduler.tail_tokens},
            {"teacher_tokens", scheduler.teacher_tokens},
            {"teacher_agreed", scheduler.teacher_agreed}}},
          {"supply",
           {{"computed_blocks", supply.computed_blocks},
            {"first_layers_blocks", supply.first_layers_blocks},
            {"local_hit_blocks", supply.local_hit_blocks},
            {"tier_hit_blocks", supply.tier_hit_blocks},
            {"asked_blocks", supply.asked_blocks},
            {"sliding_bytes_skipped", supply.sliding_bytes_skipped},
            {"sliding_bytes_fetched_later", supply.sliding_bytes_fetched_later}}},
          {"tier",
           {{"fetched_blocks", link.fetched_blocks},
            {"fetched_bytes", link.fetched_bytes},
            {"failed_blocks", link.failed_blocks},
            {"unread_blocks", link.unread_blocks},
            {"data_loss", link.data_loss},
            {"put_blocks", link.put_blocks},
            {"put_already_there", link.put_already_there},
            {"put_failed", link.put_failed}}},
          {"planner",
           {{"fetch_plans", plans.fetch_plans},
            {"fetch_plans_by_cut", fetch_plans},
            {"compute_plans", plans.compute_plans},
            {"outcomes", plans.outcomes},
            {"mean_forecast_error", plans.mean_forecast_error()},
            {"link_bytes_per_s", rates.link_bytes_per_s},
            {"round_trip_s", rates.round_trip_s},
            {"prefill_tokens_per_s", rates.prefill_tokens_per_s},
            {"encode_tokens_per_s", rates.encode_tokens_per_s},
            {"decode_tokens_per_s", decode_rates}}},
          {"local_cache",
           {{"bytes", node.cache().bytes()},
            {"limit_bytes", node.cache().limit_bytes()},
            {"evicted", node.cache().evicted()}}}};
}

Json CacheRankReport(int rank, const std::string& host, const ServerStats& stats,
                     const LinkCounters& tier, const LinkCounters& nodes) {
  return {{"rank", rank},
          {"role", RoleName(Role::kCache)},
          {"host", host},
          {"tier_link", CountersJson(tier)},
          {"node_link", CountersJson(nodes)},
          {"peak_resident_bytes", PeakResidentBytes()},
          {"shard", Json::parse(stats.ToJson())},
          {"store",
           {{"blocks", stats.store.blocks},
            {"payload_bytes", stats.store.payload_bytes},
            {"sealed", stats.store.sealed},
            {"evicted", stats.store.evicted},
            {"data_loss", stats.data_loss}}}};
}

Json MergeReport(const RunSetup& setup, std::span<const Json> ranks, const Comparison& comparison) {
  std::vector<double> ttft;
  std::vector<double> tpot;
  int failed = 0;
  for (const Answer& answer : comparison.answers) {
    if (!answer.error.ok()) {
      ++failed;
      continue;
    }
    ttft.push_back(Milliseconds(answer.ttft));
    if (answer.tokens.size() > 1) tpot.push_back(Milliseconds(answer.tpot));
  }
  uint64_t peak_resident_bytes = 0;
  for (const Json& rank : ranks) {
    peak_resident_bytes =
        std::max(peak_resident_bytes, rank.at("peak_resident_bytes").get<uint64_t>());
  }
  const Json links = Links(ranks);
  uint64_t payload = 0;
  uint64_t control = 0;
  for (const auto& [name, link] : links.items()) {
    payload += link.at("payload_bytes").get<uint64_t>();
    control += link.at("control_bytes").get<uint64_t>();
  }
  const uint64_t prompt_tokens = Sum(ranks, "scheduler", "prompt_tokens");
  const uint64_t generated = Sum(ranks, "scheduler", "generated_tokens");
  const uint64_t baseline = prompt_tokens * setup.bf16_bytes_per_token;
  const uint64_t sealed = Sum(ranks, "store", "sealed");
  const uint64_t sliding_skipped = Sum(ranks, "supply", "sliding_bytes_skipped");
  const uint64_t sliding_later = Sum(ranks, "supply", "sliding_bytes_fetched_later");
  std::string kernels_used;
  for (const Json& rank : ranks) {
    if (rank.contains("planner")) kernels_used = rank.at("kernels").get<std::string>();
  }
  Json report = {
      {"model", setup.model},
      {"weights", setup.weights},
      {"codec", setup.codec},
      {"store", setup.store},
      {"cuts", setup.cuts.empty() ? Json(nullptr) : Json(setup.cuts)},
      {"wire", setup.wire},
      {"max_kl", setup.max_kl.has_value() ? Json(*setup.max_kl) : Json(nullptr)},
      {"transport", setup.transport},
      {"roles", setup.roles},
      {"ranks", ranks.size()},
      {"requests", comparison.answers.size()},
      {"failed_requests", failed},
      {"prompt_tokens", prompt_tokens},
      {"hit_tokens", Sum(ranks, "scheduler", "hit_tokens")},
      {"local_hit_tokens", Sum(ranks, "scheduler", "local_hit_tokens")},
      {"tier_hit_tokens", Sum(ranks, "scheduler", "tier_hit_tokens")},
      {"generated_tokens", generated},
      {"asked_tokens", Sum(ranks, "supply", "asked_blocks") * kBlockTokens},
      {"prefill_tokens_computed", Sum(ranks, "supply", "computed_blocks") * kBlockTokens +
                                      Sum(ranks, "scheduler", "tail_tokens")},
      {"recomputed_after_failure_tokens",
       Sum(ranks, "scheduler", "recomputed_after_failure_tokens")},
      {"ttft_ms_p50", Percentile(ttft, 0.5)},
      {"ttft_ms_p99", Percentile(ttft, 0.99)},
      {"tier_hits", TierHits(comparison.answers)},
      {"tpot_ms_p50", Percentile(tpot, 0.5)},
      {"tpot_ms_p99", Percentile(tpot, 0.99)},
      {"links", links},
      {"payload_bytes", payload},
      {"control_bytes", control},
      {"bytes_per_generated_token",
       Ratio(static_cast<double>(payload + control), static_cast<double>(generated))},
      {"baseline_bytes", baseline},
      {"sliding_bytes_not_fetched", sliding_skipped - std::min(sliding_skipped, sliding_later)},
      {"traffic_ratio",
       Ratio(static_cast<double>(baseline), static_cast<double>(payload + control))},
      {"stored_bytes", Sum(ranks, "store", "payload_bytes")},
      {"stored_blocks", Sum(ranks, "store", "blocks")},
      {"dedup_ratio",
       Ratio(static_cast<double>(prompt_tokens) / kBlockTokens, static_cast<double>(sealed))},
      {"data_loss", Sum(ranks, "tier", "data_loss") + Sum(ranks, "store", "data_loss")},
      {"planner", PlansOf(ranks)},
      {"kernels", kernels_used},
      {"wall_s", setup.wall_s},
      {"peak_resident_bytes", peak_resident_bytes},
      {"rank_reports", ranks}};
  if (comparison.reference.has_value()) {
    const Agreement agreement = CountIdentical(comparison.answers, *comparison.reference);
    report["identical_to_reference"] = agreement.identical;
    report["compared"] = agreement.compared;
  }
  if (comparison.raw_reference.has_value()) {
    const Agreement agreement = CountIdentical(comparison.answers, *comparison.raw_reference);
    report["identical_to_raw"] = agreement.identical;
    report["compared_to_raw"] = agreement.compared;
  }
  const uint64_t teacher = Sum(ranks, "scheduler", "teacher_tokens");
  if (teacher > 0) {
    report["teacher_forced_tokens"] = teacher;
    report["teacher_forced_agreement"] =
        Ratio(static_cast<double>(Sum(ranks, "scheduler", "teacher_agreed")),
              static_cast<double>(teacher));
  }
  return report;
}

Result<std::string> FormatReport(const Json& report, const Json* without_cache) {
  std::string page;
  const auto line = [&page](std::string_view label, const std::string& text) {
    page += fmt::format("  {:<24}{}\n", label, text);
  };
  try {
    const auto number = [&report](const char* field) { return report.at(field).get<double>(); };
    const double prompt = number("prompt_tokens");
    const auto share = [prompt](double tokens) { return 100.0 * Ratio(tokens, prompt); };
    const std::string store = report.value("store", "plain");
    const Json cuts = report.value("cuts", Json());
    const std::string held = cuts.is_null() ? "" : fmt::format(" ({})", cuts.get<std::string>());
    const std::string weights = report.value("weights", "exact");
    const Json max_kl = report.value("max_kl", Json());
    const std::string budget =
        max_kl.is_null() ? "" : fmt::format(" within {:g} nats a token", max_kl.get<double>());
    page += fmt::format(
        "{}{} on {} rank{} ({}), {}{} over {}, decode reads {}{}\n\n",
        report.at("model").get<std::string>(), weights == "exact" ? "" : " in " + weights,
        report.at("ranks").get<int>(), report.at("ranks") == 1 ? "" : "s",
        report.at("roles").get<std::string>(), report.at("codec").get<std::string>(),
        store == "plain" ? "" : " stored " + store + held,
        report.at("transport").get<std::string>(), report.at("wire").get<std::string>(), budget);
    line("requests",
         fmt::format("{:.0f}, {:.0f} failed", number("requests"), number("failed_requests")));
    line("prompt tokens", fmt::format("{:.0f}", prompt));
    line("  found in the node", fmt::format("{:.0f} ({:.1f} %)", number("local_hit_tokens"),
                                            share(number("local_hit_tokens"))));
    line("  found in the tier", fmt::format("{:.0f} ({:.1f} %)", number("tier_hit_tokens"),
                                            share(number("tier_hit_tokens"))));
    if (number("asked_tokens") > 0) {
      line("  from prefill ranks",
           fmt::format("{:.0f} ({:.1f} %)", number("asked_tokens"), share(number("asked_tokens"))));
    }
    line("computed in prefill", fmt::format("{:.0f}", number("prefill_tokens_computed")));
    line("generated tokens",
         fmt::format("{:.0f} in {:.1f} s", number("generated_tokens"), number("wall_s")));
    line("time to first token",
         fmt::format("{:.1f} ms p50, {:.1f} ms p99", number("ttft_ms_p50"), number("ttft_ms_p99")));
    const Json& hits = report.at("tier_hits");
    if (hits.at("requests") > 0) {
      line("  hits in the tier",
           fmt::format("{:.1f} ms p50, {:.1f} ms mean of {:.0f} requests, {:.0f} of them fetched",
                       hits.at("ttft_ms_p50").get<double>(), hits.at("ttft_ms_mean").get<double>(),
                       hits.at("requests").get<double>(),
                       hits.at("fetched_requests").get<double>()));
    }
    line("time per token",
         fmt::format("{:.2f} ms p50, {:.2f} ms p99", number("tpot_ms_p50"), number("tpot_ms_p99")));
    const std::string plans = PlansLine(report.at("planner"));
    if (!plans.empty()) line("plans", plans);
    line("resident memory",
         fmt::format("{} at its peak{}", FormatBytes(number("peak_resident_bytes")),
                     report.at("ranks") == 1 ? "" : ", in the largest rank"));
    const double moved = number("payload_bytes") + number("control_bytes");
    if (moved > 0) {
      page += "\n  bytes on the wire           payload      control\n";
      for (const auto& [name, link] : report.at("links").items()) {
        std::string label = name;
        std::replace(label.begin(), label.end(), '_', ' ');
        page += fmt::format("    {:<18} {:>12} {:>12}\n", label,
                            FormatBytes(link.at("payload_bytes").get<double>()),
                            FormatBytes(link.at("control_bytes").get<double>()));
      }
      line("in all", fmt::format("{}, {} per generated token", FormatBytes(moved),
                                 FormatBytes(number("bytes_per_generated_token"))));
      if (number("sliding_bytes_not_fetched") > 0) {
        line("sliding layers", fmt::format("{} not fetched because no token will attend them",
                                           FormatBytes(number("sliding_bytes_not_fetched"))));
      }
      line("bf16 without sharing",
           fmt::format("{}, of all layers", FormatBytes(number("baseline_bytes"))));
      line("ratio", fmt::format("{:.1f} times fewer bytes", number("traffic_ratio")));
      // Of shards that are none of the run's ranks nothing is known.
      if (number("stored_blocks") > 0)
        line("stored", fmt::format("{} in {:.0f} blocks, each used {:.1f} times",
                                   FormatBytes(number("stored_bytes")), number("stored_blocks"),
                                   number("dedup_ratio")));
    }
    if (without_cache != nullptr) {
      const double computed = number("prefill_tokens_computed");
      const double alone = without_cache->at("prefill_tokens_computed").get<double>();
      page += "\n";
      line("without cache", fmt::format("{:.0f} tokens computed in prefill, {:.1f} times as many",
                                        alone, Ratio(alone, computed)));
      line(
          "  time to first token",
          fmt::format(
              "{:.1f} ms p50, {:.1f} times as long", without_cache->at("ttft_ms_p50").get<double>(),
              Ratio(without_cache->at("ttft_ms_p50").get<double>(), number("ttft_ms_p50"))));
    }
    page += "\n";
    if (report.contains("compared")) {
      line("same as one process",
           number("compared") > 0
               ? fmt::format("{:.0f} of {:.0f} answers, same codec, no cache",
                             number("identical_to_reference"), number("compared"))
               : "nothing to compare: the reference has no answer to any of these requests");
    }
    if (report.contains("compared_to_raw")) {
      line("same as raw KV", fmt::format("{:.0f} of {:.0f} answers", number("identical_to_raw"),
                                         number("compared_to_raw")));
    }
    if (report.contains("teacher_forced_agreement")) {
      line("teacher-forced",
           fmt::format("{:.2f} % of {:.0f} tokens agree", 100 * number("teacher_forced_agreement"),
                       number("teacher_forced_tokens")));
    }
    line("bad ranges refused", fmt::format("{:.0f}", number("data_loss")));
    line("kernels", report.at("kernels").get<std::string>());
  } catch (const Json::exception& error) {
    return InvalidArgument("not a report written by kvant: {}", error.what());
  }
  return page;
}

}  // namespace kvant::node
