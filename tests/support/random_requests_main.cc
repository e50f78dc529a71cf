// kvant-random-requests: writes a requests file made from a seed, for scripts.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>

#include "tests/support/random_requests.h"

int main(int argc, char** argv) {
  kvant::support::RandomRequestsOptions options;
  std::string out;
  CLI::App app("Writes a requests file made from a seed.", "kvant-random-requests");
  app.add_option("--out", out, "File to write")->required();
  app.add_option("--seed", options.seed)->capture_default_str();
  app.add_option("--count", options.count)->check(CLI::Range(1, 100000))->capture_default_str();
  app.add_option("--context", options.context, "Of the model, in tokens")
      ->check(CLI::Range(256, 1 << 20))
      ->capture_default_str();
  app.add_option("--max-tokens", options.max_tokens, "Of the longest answer")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);

  const kvant::Status status = kvant::node::WriteFile(
      out, kvant::support::FormatRequests(kvant::support::RandomRequests(options)));
  if (status.ok()) return 0;
  std::fprintf(stderr, "kvant-random-requests: %s\n", status.message().c_str());
  return 2;
}
