// scripts/make-checkpoint writes a model that loads: the large ones that it is for differ in
// numbers only.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "node/model.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

TEST(MakeCheckpoint, WritesAModelOfAboutTheSizeAskedFor) {
  support::TemporaryDirectory directory;
  const std::string command = std::string(KVANT_SOURCE_DIR) +
                              "/scripts/make-checkpoint --parameters 3e6 " +
                              directory.path().string();
  ASSERT_EQ(std::system(command.c_str()), 0);
  const auto model = Model::Load(directory.path());
  ASSERT_TRUE(model.ok()) << model.status().ToString();
  uintmax_t bytes = 0;
  for (const auto& file : std::filesystem::directory_iterator(directory.path())) {
    if (file.path().extension() == ".safetensors") bytes += file.file_size();
  }
  EXPECT_NEAR(static_cast<double>(bytes), 2 * 3e6, 0.1 * 2 * 3e6);
  const auto ids = (*model)->tokenizer().Encode("words that the vocabulary has", false);
  ASSERT_TRUE(ids.ok()) << ids.status().ToString();
  EXPECT_LT(ids->size(), 30U) << "no merge applies";
}

}  // namespace
}  // namespace kvant::node
