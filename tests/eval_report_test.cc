// `kvant eval` from its options to its files: which settings are compared, what the numbers are,
// and what it says when it cannot measure.
#include "node/eval_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "base/random.h"
#include "cache_service/manifest.h"
#include "node/eval_command.h"
#include "node/eval_plot.h"
#include "node/eval_statistics.h"
#include "node/requests.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

TEST(EvalStatistics, IntervalsCoverTheTruth) {
  // 95 % intervals over 40 samples of a skewed distribution of mean 1 hold it about as often; 150
  // trials leave 3 standard deviations of 1.8 points.
  Random random(11);
  int covered = 0;
  for (int trial = 0; trial < 150; ++trial) {
    std::vector<double> samples;
    for (int i = 0; i < 40; ++i) samples.push_back(-std::log(1 - random.Unit()));
    const Estimate mean = BootstrapMean(samples, static_cast<uint64_t>(trial));
    EXPECT_TRUE(mean.known);
    EXPECT_LE(mean.low, mean.value);
    EXPECT_GE(mean.high, mean.value);
    if (mean.low <= 1 && 1 <= mean.high) ++covered;
  }
  EXPECT_GE(covered, 150 * 86 / 100);
  EXPECT_LT(covered, 150);
}

TEST(EvalStatistics, OneSampleHasNoInterval) {
  const std::vector<double> one = {3.5};
  const Estimate mean = BootstrapMean(one, 1);
  EXPECT_EQ(mean.value, 3.5);
  EXPECT_EQ(mean.low, 3.5);
  EXPECT_FALSE(mean.known);
}

TEST(EvalStatistics, TheSameSeedGivesTheSameInterval) {
  const std::vector<double> samples = {1, 2, 3, 4, 5, 6, 7};
  EXPECT_EQ(BootstrapMean(samples, 1).low, BootstrapMean(samples, 1).low);
  EXPECT_NE(BootstrapMean(samples, 1).low, BootstrapMean(samples, 9).low);
}

TEST(EvalStatistics, QuantilesAreOfAllGroupsTogether) {
  std::vector<float> values;
  for (int i = 100; i >= 1; --i) values.push_back(static_cast<float>(i));
  EXPECT_EQ(Quantile(values, 0.99), 99);
  EXPECT_EQ(Quantile(values, 0.5), 50);
  EXPECT_EQ(Quantile(values, 1.0), 100);
  EXPECT_EQ(Quantile({7}, 0.01), 7);
  const std::vector<std::vector<float>> groups = {{values.begin(), values.begin() + 50},
                                                  {values.begin() + 50, values.end()}};
  const Estimate p99 = BootstrapQuantile(groups, 0.99, 1);
  EXPECT_EQ(p99.value, 99);
  EXPECT_EQ(p99.low, 50);    // only the group of the small ones drawn
  EXPECT_EQ(p99.high, 100);  // only that of the large ones: 51..100, the 50th of 50
}

// Elements are closed in the order they were opened, attributes are quoted, and no bare < or & is
// left.
void ExpectWellFormed(const std::string& xml) {
  std::vector<std::string> open;
  for (size_t at = 0; at < xml.size(); ++at) {
    if (xml[at] == '&') {
      const size_t end = xml.find(';', at);
      ASSERT_NE(end, std::string::npos);
      EXPECT_LE(end - at, 5U);
    }
    if (xml[at] != '<') continue;
    const size_t end = xml.find('>', at);
    ASSERT_NE(end, std::string::npos);
    const std::string tag = xml.substr(at + 1, end - at - 1);
    EXPECT_EQ(tag.find('<'), std::string::npos) << tag;
    EXPECT_EQ(std::count(tag.begin(), tag.end(), '"') % 2, 0) << tag;
    const std::string name = tag.substr(0, tag.find(' '));
    if (tag.front() == '/') {
      ASSERT_FALSE(open.empty()) << tag;
      EXPECT_EQ("/" + open.back(), tag);
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(name);
    }
    at = end;
  }
  EXPECT_TRUE(open.empty());
  EXPECT_EQ(xml.find("nan"), std::string::npos);
  EXPECT_EQ(xml.find("inf"), std::string::npos);
}

class EvalReportTest : public testing::Test {
 protected:
  // Context 640: passkeys of 512 fit, longer ones do not.
  EvalReportTest() {
    support::RandomModelOptions options;
    options.config = support::TinyConfig();
    options.config.max_positions = 640;
    EXPECT_TRUE(support::WriteRandomModel(directory_.path(), options).ok());
    std::string text;
    for (int i = 0; i < 300; ++i) text += "Line " + std::to_string(i) + " of the text. It ends.\n";
    EXPECT_TRUE(WriteFile(directory_.path() / "heldout.txt", text).ok());
    eval_.model = directory_.path();
    eval_.prefix = 128;
    eval_.suffix = 64;
    eval_.windows = 3;
    eval_.threads = 2;
    eval_.no_passkey = true;
  }
  std::string Path(const std::string& name) const { return directory_.path() / name; }
  std::vector<std::string> SettingNames() {
    const Result<std::unique_ptr<Model>> model = Model::Load(directory_.path());
    EXPECT_TRUE(model.ok());
    const Result<EvalPlan> plan = MakeEvalPlan(model->get(), eval_.codecs, eval_.wires);
    EXPECT_TRUE(plan.ok()) << plan.status().message();
    std::vector<std::string> names;
    for (const EvalSetting& setting : plan->settings) {
      names.push_back(std::string(setting.codec()) + " " + setting.wire);
    }
    return names;
  }
  // Runs eval and reads its JSON.
  json Run() {
    eval_.json = Path("f.json");
    eval_.svg = Path("f.svg");
    testing::internal::CaptureStdout();
    const Result<int> exit = Eval(eval_);
    table_ = testing::internal::GetCapturedStdout();
    EXPECT_TRUE(exit.ok()) << exit.status().message();
    const Result<std::string> text = ReadFile(eval_.json);
    EXPECT_TRUE(text.ok());
    return json::parse(*text);
  }
  void ExpectRefused(const std::vector<std::string>& said) {
    const Result<int> exit = Eval(eval_);
    ASSERT_FALSE(exit.ok());
    EXPECT_EQ(exit.status().code(), StatusCode::kInvalidArgument) << exit.status().message();
    for (const std::string& part : said) EXPECT_THAT(exit.status().message(), HasSubstr(part));
  }

  support::TemporaryDirectory directory_;
  EvalOptions eval_;
  std::string table_;
};

TEST_F(EvalReportTest, ComparesEveryCutOnce) {
  EXPECT_THAT(SettingNames(), ElementsAre("raw full", "raw-fp32 full", "tile8 full", "tile8 k8v4",
                                          "tile8 k4v4", "tile4 full", "tile4 k4v2", "tile4 k2v2"));
  eval_.codecs = {"tile8", "raw", "tile8"};
  eval_.wires = {"full", "k8v4", "k8v8"};
  EXPECT_THAT(SettingNames(), ElementsAre("tile8 full", "tile8 k8v4", "raw full"));
}

TEST_F(EvalReportTest, WritesOneObjectForEachSetting) {
  eval_.no_passkey = false;
  eval_.passkey_samples = 1;
  const json list = Run();
  ASSERT_EQ(list.size(), 8U);
  for (const json& object : list) {
    SCOPED_TRACE(object.dump());
    EXPECT_EQ(object.at("prefix"), 128);
    EXPECT_EQ(object.at("suffix"), 64);
    EXPECT_EQ(object.at("windows"), 3);
    EXPECT_EQ(object.at("mode"), "read");
    EXPECT_EQ(object.at("model_digest").get<std::string>().size(), 64U);
    EXPECT_FALSE(object.at("openblas_core_type").get<std::string>().empty());
    for (const json* form : {&object, &object.at("class")}) {
      for (const char* field :
           {"mean_kl", "p99_kl", "top1", "ppl", "loss", "copy_loss", "passkey"}) {
        ASSERT_TRUE(form->at(field).is_number()) << field;
        const json& interval = form->at(std::string(field) + "_ci");
        EXPECT_LE(interval.at(0).get<double>(), form->at(field).get<double>()) << field;
        EXPECT_GE(interval.at(1).get<double>(), form->at(field).get<double>()) << field;
      }
      EXPECT_NEAR(form->at("ppl").get<double>(), std::exp(form->at("loss").get<double>()), 1e-6);
      EXPECT_EQ(form->at("passkey_by_length").size(), 1U);
      EXPECT_TRUE(form->at("passkey_by_length").contains("512"));
      EXPECT_EQ(form->at("passkey_by_depth").size(), 5U);
      EXPECT_TRUE(form->at("passkey_by_depth").contains("0.05"));
    }
    for (const char* field : {"exact_loss", "zeroed_prefix_loss", "shuffled_prefix_loss"}) {
      EXPECT_TRUE(object.at(field).is_number()) << field;
      EXPECT_EQ(object.at(std::string(field) + "_ci").size(), 2U) << field;
    }
    EXPECT_GT(object.at("noise_floor_kl").get<double>(), 0);
  }
  EXPECT_EQ(list[0].at("codec"), "raw");
  EXPECT_EQ(list[0].at("mean_kl"), 0);
  EXPECT_EQ(list[0].at("p99_kl"), 0);
  EXPECT_EQ(list[0].at("top1"), 1);
  EXPECT_EQ(list[0].at("class").at("mean_kl"), 0);
  EXPECT_EQ(list[0].at("loss"), list[0].at("exact_loss"));
  EXPECT_EQ(list[3].at("codec"), "tile8");
  EXPECT_EQ(list[3].at("wire"), "k8v4");
  EXPECT_GT(list[3].at("mean_kl"), list[2].at("mean_kl"));

  std::istringstream lines(table_);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100U) << line;
  EXPECT_THAT(table_, HasSubstr("Exact: the prefix computed and read in the class raw"));
  EXPECT_THAT(table_, HasSubstr("Noise floor: "));
  EXPECT_THAT(table_, HasSubstr("set to zero"));
  EXPECT_THAT(table_, HasSubstr("Passkey: right answers of 5 prompts"));

  const Result<std::string> svg = ReadFile(eval_.svg);
  ASSERT_TRUE(svg.ok());
  ExpectWellFormed(*svg);
  EXPECT_THAT(*svg, HasSubstr("tile8 k8v4"));
  EXPECT_THAT(*svg, HasSubstr("noise floor"));
  EXPECT_THAT(*svg, HasSubstr("KL 0: raw full"));
}

TEST_F(EvalReportTest, BitsAreThoseOfTheFormat) {
  // By docs/block-format.md, 2 heads of 16 channels, 64 tokens. tile8: a key channel has a scale of
  // 16 bits for 64 codes of 8 bits, a value row one for 16 codes. tile4: the key channel has a zero
  // point too. Of the two blocks the first is read in full.
  const double tile8 = (8 + 16.0 / 64 + 8 + 16.0 / 16) / 2;
  const double tile4 = (4 + 32.0 / 64 + 4 + 16.0 / 16) / 2;
  const std::vector<std::pair<std::string, double>> expected = {
      {"raw full", 16},
      {"raw-fp32 full", 32},
      {"tile8 full", tile8},
      {"tile8 k8v4", (tile8 + (8 + 16.0 / 64 + 4 + 16.0 / 16) / 2) / 2},
      {"tile8 k4v4", (tile8 + (4 + 16.0 / 64 + 4 + 16.0 / 16) / 2) / 2},
      {"tile4 full", tile4},
      {"tile4 k4v2", (tile4 + (4 + 32.0 / 64 + 2 + 16.0 / 16) / 2) / 2},
      {"tile4 k2v2", (tile4 + (2 + 32.0 / 64 + 2 + 16.0 / 16) / 2) / 2}};
  eval_.no_class = true;
  const json list = Run();
  ASSERT_EQ(list.size(), expected.size());
  const double elements = 64 * 2 * 2 * 2 * 16;  // tokens, layers, keys and values, heads, channels
  for (size_t i = 0; i < expected.size(); ++i) {
    const json& object = list[i];
    EXPECT_EQ(object.at("codec").get<std::string>() + " " + object.at("wire").get<std::string>(),
              expected[i].first);
    EXPECT_DOUBLE_EQ(object.at("payload_bits_per_element"), expected[i].second);
    const double bits = object.at("bits_per_element");
    const double manifest_bytes = (bits - expected[i].second) * elements / 8;
    // Two rows for each layer and cut, each with a checksum of 8 bytes; a key of 32.
    const size_t rows = 2 * 2 * (expected[i].first.starts_with("tile") ? 2 : 1);
    EXPECT_GE(manifest_bytes, 32 + 8 * static_cast<double>(rows)) << object;
    EXPECT_LE(manifest_bytes, static_cast<double>(MaxManifestBytes(rows))) << object;
    EXPECT_DOUBLE_EQ(object.at("ratio_to_bf16"), 16 / bits);
    EXPECT_TRUE(object.at("class").is_null());
    EXPECT_TRUE(object.at("passkey").is_null());
  }
}

TEST_F(EvalReportTest, OneWindowHasNumbersWithoutIntervals) {
  eval_.windows = 1;
  eval_.codecs = {"tile8"};
  eval_.wires = {"full"};
  const json list = Run();
  ASSERT_EQ(list.size(), 1U);
  EXPECT_TRUE(list[0].at("mean_kl").is_number());
  EXPECT_TRUE(list[0].at("mean_kl_ci").is_null());
  EXPECT_TRUE(list[0].at("noise_floor_kl").is_null());
  ExpectWellFormed(*ReadFile(eval_.svg));
}

TEST_F(EvalReportTest, ANameIsTextInThePlot) {
  EvalSummary summary;
  summary.setup.model = "a<b>&\"c\"";
  ExpectWellFormed(EvalPlot(summary));
  EXPECT_THAT(EvalPlot(summary), HasSubstr("a&lt;b&gt;&amp;&quot;c&quot;"));
}

TEST_F(EvalReportTest, BaselinesStandBesideCodecs) {
  eval_.codecs = {"q8_0/q4_0", "tile8", "kivi2", "q8_0/q4_0"};
  eval_.wires = {"k4v4", "full"};
  EXPECT_THAT(SettingNames(),
              ElementsAre("q8_0/q4_0 full", "tile8 k4v4", "tile8 full", "kivi2 full"));
  const json list = Run();
  ASSERT_EQ(list.size(), 4U);
  EXPECT_EQ(list[0]["codec"], "q8_0/q4_0");
  EXPECT_EQ(list[0]["wire"], "full");
  // Nothing of the tier stands around it.
  EXPECT_EQ(list[0]["bits_per_element"], 6.5);
  EXPECT_EQ(list[0]["payload_bits_per_element"], 6.5);
  EXPECT_EQ(list[0]["table_bytes"], 0);
  EXPECT_TRUE(list[0]["class"].is_object());
  // A window at the end of the sequence is nothing that a block could have.
  EXPECT_TRUE(list[3]["class"].is_null());
  EXPECT_THAT(table_, HasSubstr("q8_0/q4_0 full read    6.50"));
  std::istringstream lines(table_);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100U) << line;
  const Result<std::string> plot = ReadFile(eval_.svg);
  ASSERT_TRUE(plot.ok());
  EXPECT_THAT(*plot, HasSubstr("kivi2 full"));
}

TEST_F(EvalReportTest, KindsAreReportedByThemselves) {
  const std::string held_out = *ReadFile(Path("heldout.txt"));
  const auto write = [&](const std::string& name, size_t from) {
    const std::filesystem::path file = directory_.path() / "texts" / name;
    std::filesystem::create_directories(file.parent_path());
    ASSERT_TRUE(WriteFile(file, held_out.substr(from, 2000)).ok());
  };
  write("code/a.c", 0);
  write("code/b.c", 2000);
  write("prose/c.txt", 4000);
  write("prose/d.txt", 6000);
  write("prose/e.txt", 7000);
  eval_.texts = Path("texts");
  eval_.windows = 0;
  eval_.codecs = {"tile8", "tile4", "kivi2"};
  eval_.wires = {"full"};
  const json list = Run();
  ASSERT_EQ(list.size(), 3U);
  for (const json& object : list) {
    SCOPED_TRACE(object.dump());
    EXPECT_EQ(object.at("windows"), 5);
    EXPECT_EQ(object.at("text"), Path("texts"));
    const json& kinds = object.at("kinds");
    ASSERT_EQ(kinds.size(), 2U);
    EXPECT_EQ(kinds.at("code").at("windows"), 2);
    EXPECT_EQ(kinds.at("prose").at("windows"), 3);
    for (const char* field : {"mean_kl", "top1", "loss", "copy_loss", "bits_per_element",
                              "exact_loss", "zeroed_prefix_loss", "shuffled_prefix_loss"}) {
      SCOPED_TRACE(field);
      const double whole = object.at(field);
      EXPECT_NEAR((2 * kinds.at("code").at(field).get<double>() +
                   3 * kinds.at("prose").at(field).get<double>()) /
                      5,
                  whole, 1e-9 + 1e-6 * std::abs(whole));
    }
    EXPECT_NE(kinds.at("code").at("mean_kl"), kinds.at("prose").at("mean_kl"));
    EXPECT_EQ(kinds.at("prose").at("p99_kl_ci").size(), 2U);
    EXPECT_EQ(kinds.at("prose").at("ppl_ci").size(), 2U);
    const json& in_class = kinds.at("prose").at("class");
    EXPECT_EQ(in_class.is_null(), object.at("codec") == "kivi2");
    if (!in_class.is_null()) {
      EXPECT_GT(in_class.at("mean_kl").get<double>(), 0);
    }
  }
  EXPECT_THAT(table_, HasSubstr("\ncode: 2 windows\n"));
  EXPECT_THAT(table_, HasSubstr("\nprose: 3 windows\n"));
  std::istringstream lines(table_);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100U) << line;

  // One text has no kinds, and says so.
  eval_.texts.clear();
  eval_.windows = 2;
  EXPECT_TRUE(Run()[0].at("kinds").is_null());
}

TEST_F(EvalReportTest, RefusesWhatItCannotMeasure) {
  const EvalOptions good = eval_;
  eval_.prefix = 100;
  ExpectRefused({"--prefix 100", "multiple of 64"});
  eval_ = good;
  eval_.suffix = 4;
  ExpectRefused({"--suffix 4"});
  eval_ = good;
  eval_.prefix = 640;
  ExpectRefused({"context is 640", "--prefix 448 --suffix 160 would fit"});
  eval_ = good;
  eval_.wires = {"k8"};
  ExpectRefused({"'k8'", "kNvM"});
  eval_.wires = {"auto"};
  ExpectRefused({"'auto'"});
  eval_ = good;
  eval_.codecs = {"zip"};
  ExpectRefused({"zip", "tile8", "q8_0", "kivi4"});
  eval_.codecs = {"kvtc"};
  ExpectRefused({"kvtc", "--calibration"});
  eval_.calibration = {Path("no.txt")};
  ExpectRefused({"no.txt"});
  eval_.calibration.clear();
  eval_.codecs = {"q8_0"};
  eval_.wires = {"k8"};
  ExpectRefused({"'k8'", "kNvM"});
  eval_ = good;
  eval_.text = Path("absent.txt");
  ExpectRefused({"absent.txt"});
  eval_.texts = directory_.path();
  ExpectRefused({"--text", "--texts"});
  eval_.text.clear();
  ExpectRefused({"a subfolder for each kind"});
  eval_.texts.clear();
  ASSERT_TRUE(WriteFile(Path("short.txt"), "Too short.").ok());
  eval_.text = Path("short.txt");
  ExpectRefused({"short.txt", "--text"});
  eval_ = good;
  eval_.json = "/nowhere/f.json";
  ExpectRefused({"/nowhere/f.json"});
  eval_ = good;
  ASSERT_TRUE(std::filesystem::remove(Path("heldout.txt")));
  ExpectRefused({"heldout.txt", "--text FILE"});
}

}  // namespace
}  // namespace kvant::node
