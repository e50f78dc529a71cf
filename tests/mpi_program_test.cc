// `mpirun kvant run`: requests that nobody here has seen, on several splits of roles, give the
// answers of one process without cache.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "node/requests.h"
#include "tests/support/node_world.h"
#include "tests/support/program.h"
#include "tests/support/random_model.h"
#include "tests/support/random_requests.h"

namespace kvant {
namespace {

using nlohmann::json;
using support::ProgramResult;
using support::RunProgram;
using testing::HasSubstr;

constexpr Duration kRun = std::chrono::seconds(90);

size_t Count(const std::string& text, const std::string& what) {
  size_t count = 0;
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + 1)) ++count;
  return count;
}

class MpiProgram : public testing::Test {
 protected:
  static std::string Path(const std::string& name) { return directory_->path() / name; }
  static void SetUpTestSuite() { directory_ = std::make_unique<support::TemporaryDirectory>(); }
  static void TearDownTestSuite() { directory_.reset(); }

  static std::vector<std::string> Mpirun(int ranks, const std::vector<std::string>& more) {
    std::vector<std::string> command = {MPIEXEC_PATH, "--allow-run-as-root", "--oversubscribe",
                                        "-np",        std::to_string(ranks), KVANT_PATH,
                                        "run"};
    command.insert(command.end(), more.begin(), more.end());
    return command;
  }
  // The file's requests answered by one process, without cache.
  static std::string Reference(const std::string& requests, const std::string& codec) {
    const std::string answers = Path("reference-" + codec);
    const ProgramResult result =
        RunProgram({KVANT_PATH, "run", "--model", support::TinyModel(), "--requests", requests,
                    "--codec", codec, "--no-cache", "--threads", "1", "--answers", answers},
                   kRun);
    // One request is longer than the context: it fails everywhere alike.
    EXPECT_EQ(result.exit, 1) << result.errors;
    return answers;
  }

  static inline std::unique_ptr<support::TemporaryDirectory> directory_;
};

TEST_F(MpiProgram, AnyRolesGiveTheAnswersOfOneProcess) {
  struct Split {
    int ranks;
    const char* roles;
    const char* codec;
    const char* store;
    const char* transport;
  };
  const Split splits[] = {
      {3, "cache=1,prefill=1,decode=1", "tile8", "plain", "mpi"},
      {3, "cache=1,decode=2", "raw", "plain", "mpi"},
      {3, "cache=1,prefill=1,decode=1", "raw", "lossless", "mpi"},
      {4, "cache=2,prefill=1,decode=1", "tile4", "plain", "tcp"},
      {4, "cache=1,prefill=1,decode=2", "tile8", "plain", "mpi"},
      {4, "cache=1,prefill=1,decode=2", "tile8", "plain", "shm"},
      {6, "cache=2,prefill=2,decode=2", "tile8", "plain", "mpi"},
  };
  const std::string requests = Path("requests");
  const std::vector<node::Request> made = support::RandomRequests({.seed = 77, .count = 16});
  ASSERT_TRUE(node::WriteFile(requests, support::FormatRequests(made)).ok());
  std::map<std::string, std::string> references;
  for (const Split& split : splits) {
    SCOPED_TRACE(testing::Message() << split.roles << " " << split.codec << " " << split.transport);
    std::string& reference = references[split.codec];
    if (reference.empty()) reference = Reference(requests, split.codec);
    const std::string report_file = Path("report");
    const ProgramResult result =
        RunProgram(Mpirun(split.ranks, {"--model",        support::TinyModel(),
                                        "--requests",     requests,
                                        "--codec",        split.codec,
                                        "--store",        split.store,
                                        "--roles",        split.roles,
                                        "--transport",    split.transport,
                                        "--cache-memory", "16MiB",
                                        "--reference",    reference,
                                        "--report",       report_file,
                                        "--answers",      Path("answers")}),
                   kRun);
    ASSERT_NE(result.exit, -1) << "did not end: " << result.errors;
    EXPECT_NE(result.exit, 0) << "the request that fails shows in the exit status";
    EXPECT_THAT(result.errors, HasSubstr("shorten the prompt"));
    const Result<std::string> text = node::ReadFile(report_file);
    ASSERT_TRUE(text.ok()) << result.errors;
    const json report = json::parse(*text);
    EXPECT_EQ(report.at("requests"), made.size());
    EXPECT_EQ(report.at("compared"), made.size());
    EXPECT_EQ(report.at("identical_to_reference"), report.at("compared"));
    EXPECT_EQ(report.at("failed_requests"), 1);
    EXPECT_EQ(report.at("ranks"), split.ranks);
    EXPECT_EQ(report.at("transport"), split.transport);
    EXPECT_EQ(report.at("store"), split.store);
    EXPECT_GT(report.at("hit_tokens").get<int>(), 0);
    EXPECT_GT(report.at("payload_bytes").get<uint64_t>(), 0u);
    EXPECT_GT(report.at("traffic_ratio").get<double>(), 1.0);
    EXPECT_THAT(result.out, HasSubstr("same as one process"));
  }
}

TEST_F(MpiProgram, ErrorsAreSaidOnceAndEndAllRanks) {
  const std::string requests = Path("few");
  ASSERT_TRUE(node::WriteFile(requests, support::FormatRequests(
                                            support::RandomRequests({.seed = 1, .count = 2})))
                  .ok());
  const std::string model = support::TinyModel();
  const struct {
    std::vector<std::string> flags;
    std::string said;
  } cases[] = {
      {{"--model", model, "--requests", requests, "--roles", "cache=2,prefill=1,decode=1"}, "3"},
      {{"--model", model, "--requests", requests, "--roles", "cache=2,prefill=1"}, "decode"},
      {{"--model", model, "--requests", requests, "--roles", "prefill=1,decode=2"}, "cache"},
      {{"--model", model, "--requests", requests, "--roles", "cash=3"}, "cash"},
      {{"--model", "/nowhere/model", "--requests", requests}, "/nowhere/model"},
      {{"--model", model, "--requests", "/nowhere/file"}, "/nowhere/file"},
      {{"--model", model, "--requests", requests, "--transport", "pigeon"}, "pigeon"},
      {{"--model", model, "--requests", requests, "--cache", "tcp://127.0.0.1:1"}, "mpirun"},
  };
  for (const auto& c : cases) {
    const ProgramResult result = RunProgram(Mpirun(3, c.flags), kRun);
    EXPECT_GT(result.exit, 0) << c.said;
    EXPECT_THAT(result.errors, HasSubstr(c.said));
    EXPECT_EQ(Count(result.errors, "kvant: "), 1u) << result.errors;
  }
}

}  // namespace
}  // namespace kvant
