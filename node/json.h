// Reading JSON from files that nobody vouches for: limits, errors that name the file and the field.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/status.h"

namespace kvant::node {

// The bytes of a file of at most `limit_bytes`. kInvalidArgument names it and says why not.
Result<std::string> ReadFile(const std::filesystem::path& path, uint64_t limit_bytes);

// kInvalidArgument names `name` and the place in the text. An object with one key twice is refused,
// because readers differ in which of them counts, and so is nesting beyond 64 levels.
Result<nlohmann::json> ParseJson(std::string_view text, const std::string& name);

// object[key], or nullptr when it is absent or null. REQUIRES: object.is_object().
const nlohmann::json* FindField(const nlohmann::json& object, std::string_view key);

// An integer field in [min, max]; `absent` when there is none. kInvalidArgument names file, field,
// what was found and what is allowed.
Result<int64_t> IntegerField(const nlohmann::json& object, std::string_view key, int64_t min,
                             int64_t max, int64_t absent, const std::string& name);
// The same, and an error when the field is absent.
Result<int64_t> IntegerField(const nlohmann::json& object, std::string_view key, int64_t min,
                             int64_t max, const std::string& name);
// A finite number in [min, max]; `absent` when there is none.
Result<double> NumberField(const nlohmann::json& object, std::string_view key, double min,
                           double max, double absent, const std::string& name);
Result<bool> BooleanField(const nlohmann::json& object, std::string_view key, bool absent,
                          const std::string& name);
Result<std::string> StringField(const nlohmann::json& object, std::string_view key,
                                std::string_view absent, const std::string& name);

}  // namespace kvant::node
