#include "node/json.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <utility>
#include <vector>

namespace kvant::node {
namespace {

using nlohmann::json;

// What any file that is read here needs, with room to spare. Every level costs memory of its own,
// so a file of nothing but brackets would take a hundred times its size.
constexpr size_t kMaxDepth = 64;
// A parser's message repeats what it read last, which can be as long as the file.
constexpr size_t kMaxMessageBytes = 300;

// Builds the document while it is read, and stops at the first thing that is not taken.
class Builder final : public nlohmann::json_sax<json> {
 public:
  bool null() override { return Put(nullptr) != nullptr; }
  bool boolean(bool value) override { return Put(value) != nullptr; }
  bool number_integer(int64_t value) override { return Put(value) != nullptr; }
  bool number_unsigned(uint64_t value) override { return Put(value) != nullptr; }
  bool number_float(double value, const std::string& /*written*/) override {
    return Put(value) != nullptr;
  }
  bool string(std::string& value) override { return Put(std::move(value)) != nullptr; }
  bool binary(json::binary_t& value) override { return Put(std::move(value)) != nullptr; }
  bool start_object(size_t /*elements*/) override { return Open(json::object()); }
  bool start_array(size_t /*elements*/) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(std::string& name) override {
    const auto [entry, added] =
        open_.back()->get_ptr<json::object_t*>()->try_emplace(std::move(name), nullptr);
    if (!added) error_ = fmt::format("key \"{}\" stands twice in one object", entry->first);
    field_ = &entry->second;
    return added;
  }
  bool parse_error(size_t /*position*/, const std::string& /*token*/,
                   const json::exception& error) override {
    error_ = error.what();
    return false;
  }

  const std::string& error() const { return error_; }
  json& document() { return document_; }

 private:
  // Where the value stands from now on.
  json* Put(json value) {
    if (open_.empty()) {
      document_ = std::move(value);
      return &document_;
    }
    if (open_.back()->is_array()) return &open_.back()->emplace_back(std::move(value));
    *field_ = std::move(value);
    return field_;
  }
  bool Open(json value) {
    if (open_.size() == kMaxDepth) {
      error_ = fmt::format("nested deeper than {} levels", kMaxDepth);
      return false;
    }
    open_.push_back(Put(std::move(value)));
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  json document_;
  std::vector<json*> open_;  // arrays and objects that are not closed yet, the innermost last
  json* field_ = nullptr;    // of the innermost object, whose value comes next
  std::string error_;
};

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
  Builder builder;
  if (json::sax_parse(text, &builder)) return std::move(builder.document());
  return InvalidArgument("{}: malformed JSON: {}", name,
                         std::string_view(builder.error()).substr(0, kMaxMessageBytes));
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
