// A JSON reader for tests: strict, small, no surprises. What is not JSON is a null pointer.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "test/check.h"
#include "util/utf8.h"

namespace tidegate::test {

struct Json {
  enum class Kind { kNull, kBool, kNumber, kString, kArray, kObject };
  Kind kind = Kind::kNull;
  double number = 0;  // kBool: 0 or 1
  std::string text;
  std::vector<Json> items;
  std::map<std::string, Json> members;

  const Json& operator[](const std::string& name) const {
    const auto at = members.find(name);
    if (at == members.end()) Fail(__FILE__, __LINE__, "no member " + name);
    return at->second;
  }
  bool has(const std::string& name) const { return members.contains(name); }

  static std::unique_ptr<Json> Parse(std::string_view text);
};

namespace json_internal {

class Reader {
 public:
  explicit Reader(std::string_view text) : rest_(text) {}

  bool Value(Json* out, int depth = 0) {
    Blanks();
    if (rest_.empty() || depth > 64) return false;
    switch (rest_[0]) {
      case '{': return Object(out, depth);
      case '[': return Array(out, depth);
      case '"': out->kind = Json::Kind::kString; return String(&out->text);
      case 't': return Word("true", Json::Kind::kBool, 1, out);
      case 'f': return Word("false", Json::Kind::kBool, 0, out);
      case 'n': return Word("null", Json::Kind::kNull, 0, out);
      default: return Number(out);
    }
  }
  bool AtEnd() {
    Blanks();
    return rest_.empty();
  }

 private:
  void Blanks() {
    while (!rest_.empty() && std::string_view(" \t\r\n").find(rest_[0]) != std::string_view::npos) Skip(1);
  }
  void Skip(size_t n) { rest_.remove_prefix(n); }
  bool Take(char c) {
    Blanks();
    if (rest_.empty() || rest_[0] != c) return false;
    Skip(1);
    return true;
  }
  bool Word(std::string_view word, Json::Kind kind, double number, Json* out) {
    if (!rest_.starts_with(word)) return false;
    Skip(word.size());
    out->kind = kind;
    out->number = number;
    return true;
  }
  bool Number(Json* out) {
    const size_t size = rest_.find_first_not_of("+-.0123456789eE");
    const std::string digits(rest_.substr(0, size));
    char* end = nullptr;
    out->kind = Json::Kind::kNumber;
    out->number = std::strtod(digits.c_str(), &end);
    Skip(digits.size());
    return !digits.empty() && *end == '\0';
  }
  bool String(std::string* out) {
    Skip(1);
    while (!rest_.empty() && rest_[0] != '"') {
      if (static_cast<unsigned char>(rest_[0]) < 0x20) return false;
      if (rest_[0] == '\\') {
        if (!Escape(out)) return false;
        continue;
      }
      const size_t length = Utf8Length(rest_);
      if (length == 0) return false;
      out->append(rest_.substr(0, length));
      Skip(length);
    }
    if (rest_.empty()) return false;
    Skip(1);
    return true;
  }
  bool Escape(std::string* out) {
    if (rest_.size() < 2) return false;
    const size_t at = std::string_view("\"\\/bfnrtu").find(rest_[1]);
    if (at == std::string_view::npos) return false;
    Skip(2);
    if (at < 8) {
      out->push_back("\"\\/\b\f\n\r\t"[at]);
      return true;
    }
    if (rest_.size() < 4) return false;
    const std::string hex(rest_.substr(0, 4));
    if (hex.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) return false;
    const unsigned long code = std::strtoul(hex.c_str(), nullptr, 16);
    Skip(4);
    // What these tests write escapes control characters only.
    if (code >= 0x80) return false;
    out->push_back(static_cast<char>(code));
    return true;
  }
  bool Array(Json* out, int depth) {
    Skip(1);
    out->kind = Json::Kind::kArray;
    if (Take(']')) return true;
    do {
      if (!Value(&out->items.emplace_back(), depth + 1)) return false;
    } while (Take(','));
    return Take(']');
  }
  bool Object(Json* out, int depth) {
    Skip(1);
    out->kind = Json::Kind::kObject;
    if (Take('}')) return true;
    do {
      Blanks();
      std::string name;
      if (rest_.empty() || rest_[0] != '"' || !String(&name)) return false;
      if (!Take(':') || out->members.contains(name)) return false;
      if (!Value(&out->members[name], depth + 1)) return false;
    } while (Take(','));
    return Take('}');
  }

  std::string_view rest_;
};

}  // namespace json_internal

inline std::unique_ptr<Json> Json::Parse(std::string_view text) {
  json_internal::Reader reader(text);
  auto value = std::make_unique<Json>();
  if (!reader.Value(value.get()) || !reader.AtEnd()) return nullptr;
  return value;
}

}  // namespace tidegate::test
