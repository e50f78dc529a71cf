#include "node/requests.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

namespace kvant::node {
namespace {

using Json = nlohmann::json;

// Where a complaint points: every message names file, line, field and remedy.
struct Place {
  std::string_view file;
  int line = 0;

  template <typename... Args>
  Status Complain(std::string_view field, fmt::format_string<Args...> format,
                  Args&&... args) const {
    return InvalidArgument("{}, line {}: field '{}': {}", file, line, field,
                           fmt::format(format, std::forward<Args>(args)...));
  }
};

Status TakeString(const Json& object, const char* field, const Place& place, std::string* out) {
  const auto found = object.find(field);
  if (found == object.end() || found->is_null()) return OkStatus();
  if (!found->is_string()) return place.Complain(field, "expected a string");
  *out = found->get<std::string>();
  return OkStatus();
}

// A number of the body.
Status TakeNumber(const Json& body, const std::string& field, const Place& place, double low,
                  double high, double* out) {
  const auto found = body.find(field);
  if (found == body.end() || found->is_null()) return OkStatus();
  if (!found->is_number()) return place.Complain("body." + field, "expected a number");
  const double value = found->get<double>();
  if (!(value >= low && value <= high)) {
    return place.Complain("body." + field, "{} is outside {} to {}", value, low, high);
  }
  *out = value;
  return OkStatus();
}

Status TakeStop(const Json& body, const Place& place, std::vector<std::string>* out) {
  const auto found = body.find("stop");
  if (found == body.end() || found->is_null()) return OkStatus();
  const auto take = [&](const Json& item) {
    if (!item.is_string() || item.get_ref<const std::string&>().empty()) return false;
    out->push_back(item.get<std::string>());
    return true;
  };
  if (found->is_array()) {
    if (found->size() > 16) return place.Complain("body.stop", "at most 16 strings are taken");
    for (const Json& item : *found) {
      if (!take(item)) return place.Complain("body.stop", "expected non-empty strings");
    }
    return OkStatus();
  }
  if (!take(*found)) {
    return place.Complain("body.stop", "expected a non-empty string or a list of such");
  }
  return OkStatus();
}

Status TakePrompt(const Json& body, const Place& place, Request* request) {
  const auto found = body.find("prompt");
  if (found == body.end()) {
    return place.Complain("body.prompt", "missing; /v1/completions needs a string or token ids");
  }
  if (found->is_string()) {
    request->prompt = found->get<std::string>();
    return OkStatus();
  }
  if (found->is_array() && found->size() == 1 && found->front().is_string()) {
    request->prompt = found->front().get<std::string>();
    return OkStatus();
  }
  if (found->is_array() && !found->empty()) {
    for (const Json& item : *found) {
      if (!item.is_number_integer() || item.get<int64_t>() < 0 || item.get<int64_t>() > INT32_MAX) {
        return place.Complain("body.prompt", "a list must hold token ids, or one string");
      }
      request->prompt_tokens.push_back(item.get<int32_t>());
    }
    return OkStatus();
  }
  return place.Complain("body.prompt", "expected a string or a list of token ids");
}

// A string, or OpenAI's list of parts, whose texts are joined.
Status TakeContent(const Json& message, const Place& place, std::string* out) {
  const auto found = message.find("content");
  if (found == message.end() || !found->is_array()) {
    return TakeString(message, "content", place, out);
  }
  for (const Json& part : *found) {
    const bool text = part.is_object() && part.value("type", Json()) == "text" &&
                      part.contains("text") && part.at("text").is_string();
    if (!text) {
      return place.Complain("body.messages.content",
                            "expected a string, or a list of parts of the type text");
    }
    *out += part.at("text").get_ref<const std::string&>();
  }
  return OkStatus();
}

Status TakeMessages(const Json& body, const Place& place, Request* request) {
  const auto found = body.find("messages");
  if (found == body.end() || !found->is_array() || found->empty()) {
    return place.Complain("body.messages", "/v1/chat/completions needs a non-empty list");
  }
  for (const Json& item : *found) {
    ChatMessage message;
    if (!item.is_object()) return place.Complain("body.messages", "expected objects");
    KV_RETURN_IF_ERROR(TakeString(item, "role", place, &message.role));
    KV_RETURN_IF_ERROR(TakeContent(item, place, &message.content));
    if (message.role.empty()) return place.Complain("body.messages", "a message has no 'role'");
    request->messages.push_back(std::move(message));
  }
  return OkStatus();
}

Status TakeBody(const Json& body, const Place& place, Request* request) {
  static const std::set<std::string_view> kKnown = {
      "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
      "seed",  "stop",   "user",     "stream"};
  for (const auto& [field, value] : body.items()) {
    if (!kKnown.contains(field)) {
      return place.Complain("body." + field,
                            "not supported; known are model, prompt, messages, max_tokens, "
                            "temperature, top_p, seed, stop, user");
    }
  }
  if (body.value("stream", Json(false)) != Json(false)) {
    return place.Complain("body.stream", "a batch is not streamed; remove it");
  }
  KV_RETURN_IF_ERROR(request->chat ? TakeMessages(body, place, request)
                                   : TakePrompt(body, place, request));
  double max_tokens = request->max_tokens;
  for (const char* field : {"max_tokens", "max_completion_tokens"}) {
    KV_RETURN_IF_ERROR(TakeNumber(body, field, place, 1, 1 << 20, &max_tokens));
  }
  request->max_tokens = static_cast<int>(max_tokens);
  if (request->max_tokens != max_tokens) {
    return place.Complain("body.max_tokens", "{} is not a whole number", max_tokens);
  }
  KV_RETURN_IF_ERROR(TakeNumber(body, "temperature", place, 0, 2, &request->temperature));
  KV_RETURN_IF_ERROR(TakeNumber(body, "top_p", place, 0, 1, &request->top_p));
  if (request->top_p == 0) return place.Complain("body.top_p", "must be above 0");
  const auto seed = body.find("seed");
  if (seed != body.end() && !seed->is_null()) {
    if (!seed->is_number_integer()) return place.Complain("body.seed", "expected an integer");
    request->seed = seed->is_number_unsigned() ? seed->get<uint64_t>()
                                               : static_cast<uint64_t>(seed->get<int64_t>());
  }
  return TakeStop(body, place, &request->stop);
}

Status TakeRequest(const Json& line, const Place& place, Request* request) {
  if (!line.is_object()) {
    return InvalidArgument("{}, line {}: expected one JSON object a line", place.file, place.line);
  }
  static const std::set<std::string_view> kKnown = {"custom_id", "method", "url",
                                                    "body",      "tenant", "conversation"};
  for (const auto& [field, value] : line.items()) {
    if (!kKnown.contains(field)) {
      return place.Complain(field,
                            "unknown; known are custom_id, method, url, body, tenant, "
                            "conversation");
    }
  }
  KV_RETURN_IF_ERROR(TakeString(line, "custom_id", place, &request->custom_id));
  if (request->custom_id.empty()) {
    return place.Complain("custom_id", "missing; every request needs a name of its own");
  }
  std::string method;
  KV_RETURN_IF_ERROR(TakeString(line, "method", place, &method));
  if (method != "POST") return place.Complain("method", "expected \"POST\"");
  std::string url;
  KV_RETURN_IF_ERROR(TakeString(line, "url", place, &url));
  if (url == "/v1/chat/completions") {
    request->chat = true;
  } else if (url != "/v1/completions") {
    return place.Complain("url",
                          "'{}' is not served; use \"/v1/completions\" or "
                          "\"/v1/chat/completions\"",
                          url);
  }
  KV_RETURN_IF_ERROR(TakeString(line, "tenant", place, &request->tenant));
  KV_RETURN_IF_ERROR(TakeString(line, "conversation", place, &request->conversation));
  const auto body = line.find("body");
  if (body == line.end() || !body->is_object()) {
    return place.Complain("body", "missing; expected an object with the request's parameters");
  }
  return TakeBody(*body, place, request);
}

// Calls take(json, place) for each non-empty line.
template <typename Take>
Status ForEachLine(std::string_view text, std::string_view file_name, const Take& take) {
  Place place{file_name, 0};
  while (!text.empty()) {
    const size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    ++place.line;
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    Json json;
    try {
      json = Json::parse(line);
    } catch (const Json::parse_error& error) {
      // The library counts lines inside this one; its words behind the place are of use.
      const std::string_view what = error.what();
      return InvalidArgument("{}, line {}: not JSON at character {}{}", place.file, place.line,
                             error.byte, what.substr(std::min(what.find(": "), what.size())));
    } catch (const Json::out_of_range&) {
      return InvalidArgument("{}, line {}: a number that is too large for a double", place.file,
                             place.line);
    }
    KV_RETURN_IF_ERROR(take(json, place));
  }
  return OkStatus();
}

const char* FinishName(FinishReason reason) {
  return reason == FinishReason::kLength ? "length" : "stop";
}

}  // namespace

Result<std::vector<Request>> ParseRequests(std::string_view text, std::string_view file_name) {
  std::vector<Request> requests;
  std::set<std::string> names;
  KV_RETURN_IF_ERROR(ForEachLine(text, file_name, [&](const Json& line, const Place& place) {
    Request request;
    KV_RETURN_IF_ERROR(TakeRequest(line, place, &request));
    if (!names.insert(request.custom_id).second) {
      return place.Complain("custom_id", "'{}' was used before; names must be unique",
                            request.custom_id);
    }
    requests.push_back(std::move(request));
    return OkStatus();
  }));
  if (requests.empty()) {
    return InvalidArgument("{}: holds no request; one JSON object a line is expected", file_name);
  }
  return requests;
}

std::string FormatAnswer(const Answer& answer, std::string_view model, int64_t created_unix_s) {
  Json line = {{"id", "kvant-" + answer.custom_id}, {"custom_id", answer.custom_id}};
  if (!answer.error.ok()) {
    const Json error = {{"code", StatusCodeName(answer.error.code())},
                        {"message", answer.error.message()}};
    line["response"] = {{"status_code", 400}, {"request_id", line["id"]}, {"body", error}};
    line["error"] = error;
    return line.dump(-1, ' ', false, Json::error_handler_t::replace);
  }
  Json choice = {{"index", 0}, {"finish_reason", FinishName(answer.finish)}, {"logprobs", nullptr}};
  if (answer.chat) {
    choice["message"] = {{"role", "assistant"}, {"content", answer.text}};
  } else {
    choice["text"] = answer.text;
  }
  const int generated = static_cast<int>(answer.tokens.size());
  line["response"] = {{"status_code", 200},
                      {"request_id", line["id"]},
                      {"body",
                       {{"id", line["id"]},
                        {"object", answer.chat ? "chat.completion" : "text_completion"},
                        {"created", created_unix_s},
                        {"model", model},
                        {"choices", Json::array({choice})},
                        {"usage",
                         {{"prompt_tokens", answer.prompt_tokens},
                          {"completion_tokens", generated},
                          {"total_tokens", answer.prompt_tokens + generated},
                          {"prompt_tokens_details", {{"cached_tokens", answer.cached_tokens}}}}},
                        {"kvant",
                         {{"token_ids", answer.tokens},
                          {"tier_tokens", answer.tier_tokens},
                          {"fetched_tokens", answer.fetched_tokens},
                          {"ttft_ms", Milliseconds(answer.ttft)},
                          {"tpot_ms", Milliseconds(answer.tpot)}}}}}};
  line["error"] = nullptr;
  return line.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<std::vector<Answer>> ParseAnswers(std::string_view text, std::string_view file_name) {
  std::vector<Answer> answers;
  KV_RETURN_IF_ERROR(ForEachLine(text, file_name, [&](const Json& line, const Place& place) {
    Answer answer;
    try {
      answer.custom_id = line.at("custom_id").get<std::string>();
      if (!line.at("error").is_null()) {
        answer.error = Status(StatusCodeOfName(line["error"].at("code").get<std::string>()),
                              line["error"].at("message").get<std::string>());
        answer.finish = FinishReason::kError;
      } else {
        const Json& body = line.at("response").at("body");
        const Json& choice = body.at("choices").at(0);
        answer.chat = choice.contains("message");
        answer.text = answer.chat ? choice["message"].at("content").get<std::string>()
                                  : choice.at("text").get<std::string>();
        answer.finish =
            choice.at("finish_reason") == "length" ? FinishReason::kLength : FinishReason::kStop;
        answer.tokens = body.at("kvant").at("token_ids").get<std::vector<int32_t>>();
        const auto milliseconds = [&](const char* field) {
          return std::chrono::duration_cast<Duration>(
              std::chrono::duration<double, std::milli>(body["kvant"].at(field).get<double>()));
        };
        answer.ttft = milliseconds("ttft_ms");
        answer.tpot = milliseconds("tpot_ms");
        answer.tier_tokens = body["kvant"].value("tier_tokens", 0);
        answer.fetched_tokens = body["kvant"].value("fetched_tokens", 0);
        answer.prompt_tokens = body.at("usage").at("prompt_tokens").get<int>();
        answer.cached_tokens =
            body["usage"].at("prompt_tokens_details").at("cached_tokens").get<int>();
      }
    } catch (const Json::exception& error) {
      return InvalidArgument("{}, line {}: not an answer written by kvant: {}", place.file,
                             place.line, error.what());
    }
    answers.push_back(std::move(answer));
    return OkStatus();
  }));
  return answers;
}

Result<std::string> ReadFile(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    return InvalidArgument("cannot read '{}': it is a directory, a file is needed", path);
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) return InvalidArgument("cannot read '{}': {}", path, std::strerror(errno));
  std::ostringstream text;
  text << file.rdbuf();
  if (file.bad()) return InvalidArgument("cannot read '{}': {}", path, std::strerror(errno));
  return std::move(text).str();
}

Status CheckWritable(const std::string& path) {
  if (path.empty()) return OkStatus();
  std::error_code ignored;
  const bool was_there = std::filesystem::exists(path, ignored);
  std::ofstream file(path, std::ios::binary | std::ios::app);
  if (!file) return InvalidArgument("cannot write '{}': {}", path, std::strerror(errno));
  file.close();
  if (!was_there) std::filesystem::remove(path, ignored);
  return OkStatus();
}

Status WriteFile(const std::string& path, std::string_view text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  file.close();
  if (!file) return InvalidArgument("cannot write '{}': {}", path, std::strerror(errno));
  return OkStatus();
}

}  // namespace kvant::node
