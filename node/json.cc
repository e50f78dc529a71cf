#include "node/json.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <unordered_set>
#include <utility>
#include <vector>

namespace kvant::node {
namespace {

using nlohmann::json;

// What any file that is read here needs, with room to spare. Every level costs memory of its own,
// so a file of nothing but brackets would take a hundred times its size.
constexpr int kMaxDepth = 64;
// A parser's message repeats what it read last, which can be as long as the file.
constexpr size_t kMaxMessageBytes = 300;

bool IsTooDeep(std::string_view text) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMaxDepth) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

Status WrongField(const std::string& name, std::string_view key, std::string_view expected,
                  const json& found) {
  // Only the type of a composite: its text could be as long as the file.
  const std::string shown =
      found.is_structured() || found.is_string() ? found.type_name() : found.dump();
  return InvalidArgument("{}: field \"{}\" must be {}, found {}", name, key, expected, shown);
}

}  // namespace

Result<std::string> ReadFile(const std::filesystem::path& path, uint64_t limit_bytes) {
  std::error_code error;
  if (!std::filesystem::exists(path, error)) {
    return InvalidArgument("{}: no such file", path.string());
  }
  if (!std::filesystem::is_regular_file(path, error)) {
    return InvalidArgument("{}: not a regular file", path.string());
  }
  const uint64_t size = std::filesystem::file_size(path, error);
  if (error) return InvalidArgument("reading {}: {}", path.string(), error.message());
  if (size > limit_bytes) {
    return InvalidArgument("{}: has {} bytes, at most {} are read", path.string(), size,
                           limit_bytes);
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) return InvalidArgument("opening {}: {}", path.string(), std::strerror(errno));
  std::string text(size, '\0');
  file.read(text.data(), static_cast<std::streamsize>(size));
  if (static_cast<uint64_t>(file.gcount()) != size) {
    return InvalidArgument("reading {}: got {} of {} bytes; is it being written?", path.string(),
                           file.gcount(), size);
  }
  return text;
}

Result<json> ParseJson(std::string_view text, const std::string& name) {
  if (IsTooDeep(text)) {
    return InvalidArgument("{}: malformed JSON: nested deeper than {} levels", name, kMaxDepth);
  }
  std::vector<std::unordered_set<std::string>> open_objects;
  std::string duplicate;
  const auto watch = [&](int /*depth*/, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start) {
      open_objects.emplace_back();
    } else if (event == json::parse_event_t::object_end) {
      open_objects.pop_back();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!open_objects.back().insert(key).second && duplicate.empty()) duplicate = key;
    }
    return true;
  };
  try {
    json value = json::parse(text, watch);
    if (!duplicate.empty()) {
      return InvalidArgument("{}: malformed JSON: key \"{}\" stands twice in one object", name,
                             duplicate);
    }
    return value;
  } catch (const json::exception& error) {
    return InvalidArgument("{}: malformed JSON: {}", name,
                           std::string_view(error.what()).substr(0, kMaxMessageBytes));
  }
}

const json* FindField(const json& object, std::string_view key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

Result<int64_t> IntegerField(const json& object, std::string_view key, int64_t min, int64_t max,
                             int64_t absent, const std::string& name) {
  const json* field = FindField(object, key);
  if (field == nullptr) return absent;
  const std::string expected = fmt::format("an integer from {} to {}", min, max);
  if (!field->is_number_integer()) return WrongField(name, key, expected, *field);
  // Unsigned numbers beyond int64 would wrap into the range.
  if (field->is_number_unsigned() &&
      field->get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return WrongField(name, key, expected, *field);
  }
  const auto value = field->get<int64_t>();
  if (value < min || value > max) return WrongField(name, key, expected, *field);
  return value;
}

Result<int64_t> IntegerField(const json& object, std::string_view key, int64_t min, int64_t max,
                             const std::string& name) {
  if (FindField(object, key) == nullptr) {
    return InvalidArgument("{}: field \"{}\" is missing", name, key);
  }
  return IntegerField(object, key, min, max, min, name);
}

Result<double> NumberField(const json& object, std::string_view key, double min, double max,
                           double absent, const std::string& name) {
  const json* field = FindField(object, key);
  if (field == nullptr) return absent;
  const double value =
      field->is_number() ? field->get<double>() : std::numeric_limits<double>::quiet_NaN();
  if (!(value >= min && value <= max)) {
    return WrongField(name, key, fmt::format("a number from {} to {}", min, max), *field);
  }
  return value;
}

Result<bool> BooleanField(const json& object, std::string_view key, bool absent,
                          const std::string& name) {
  const json* field = FindField(object, key);
  if (field == nullptr) return absent;
  if (!field->is_boolean()) return WrongField(name, key, "true or false", *field);
  return field->get<bool>();
}

Result<std::string> StringField(const json& object, std::string_view key, std::string_view absent,
                                const std::string& name) {
  const json* field = FindField(object, key);
  if (field == nullptr) return std::string(absent);
  if (!field->is_string()) return WrongField(name, key, "a string", *field);
  return field->get<std::string>();
}

}  // namespace kvant::node
