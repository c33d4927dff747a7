// Semantic versions and ranges, pure. tests/data/versions.json is the table of comparisons that this and the Python
// side (server/versions.py) are both run on.
//
// A version is MAJOR[.MINOR[.PATCH]][-PRERELEASE][+BUILD]; missing numbers are 0, so that a folder `3` counts as 3.0.0.
// Precedence is semver.org 2.0.0 section 11 (build metadata does not count).
// Ranges: ^1.4  ~1.4  >=1.2  >1.2  <=1.2  <2  =1.2.3, several joined by blanks or commas; 1.x, 1.4.x, *.
// A pre-release satisfies a range only when some bound of the range names a pre-release of the same MAJOR.MINOR.PATCH.
#pragma once

#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tidegate {

struct SemVer {
  uint64_t major = 0;
  uint64_t minor = 0;
  uint64_t patch = 0;
  std::string prerelease;

  bool SameCore(const SemVer& o) const { return major == o.major && minor == o.minor && patch == o.patch; }
};

namespace semver_internal {

inline bool ReadNumber(std::string_view* text, uint64_t* value) {
  const char* begin = text->data();
  const char* end = begin + text->size();
  const auto [stop, error] = std::from_chars(begin, end, *value);
  if (error != std::errc() || stop == begin) return false;
  if (stop - begin > 1 && *begin == '0') return false;  // no leading zeros
  text->remove_prefix(static_cast<size_t>(stop - begin));
  return true;
}

inline bool IsNumeric(std::string_view text) {
  for (char c : text) {
    if (c < '0' || c > '9') return false;
  }
  return !text.empty();
}

inline bool IdentifiersOk(std::string_view text, bool numbers_checked) {
  while (true) {
    const size_t dot = text.find('.');
    const std::string_view part = text.substr(0, dot);
    if (part.empty()) return false;
    for (char c : part) {
      const bool ok = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-';
      if (!ok) return false;
    }
    if (numbers_checked && part.size() > 1 && part[0] == '0' && IsNumeric(part)) return false;
    if (dot == std::string_view::npos) return true;
    text.remove_prefix(dot + 1);
  }
}

inline int ComparePart(std::string_view a, std::string_view b) {
  const bool a_number = IsNumeric(a);
  const bool b_number = IsNumeric(b);
  if (a_number != b_number) return a_number ? -1 : 1;
  // Numbers have no leading zeros, so the longer one is larger.
  if (a_number && a.size() != b.size()) return a.size() < b.size() ? -1 : 1;
  const int order = a.compare(b);
  return order < 0 ? -1 : order > 0 ? 1 : 0;
}

inline int ComparePrerelease(std::string_view a, std::string_view b) {
  if (a.empty() || b.empty()) return a.empty() == b.empty() ? 0 : a.empty() ? 1 : -1;
  while (true) {
    const size_t a_dot = a.find('.');
    const size_t b_dot = b.find('.');
    if (const int order = ComparePart(a.substr(0, a_dot), b.substr(0, b_dot)); order != 0) return order;
    const bool a_end = a_dot == std::string_view::npos;
    const bool b_end = b_dot == std::string_view::npos;
    if (a_end || b_end) return a_end == b_end ? 0 : a_end ? -1 : 1;
    a.remove_prefix(a_dot + 1);
    b.remove_prefix(b_dot + 1);
  }
}

}  // namespace semver_internal

// -1, 0 or 1.
inline int Compare(const SemVer& a, const SemVer& b) {
  if (a.major != b.major) return a.major < b.major ? -1 : 1;
  if (a.minor != b.minor) return a.minor < b.minor ? -1 : 1;
  if (a.patch != b.patch) return a.patch < b.patch ? -1 : 1;
  return semver_internal::ComparePrerelease(a.prerelease, b.prerelease);
}

// Reads a version; `parts` (if given) receives how many of the three numbers were written.
inline bool ParseSemVer(std::string_view text, SemVer* out, int* parts = nullptr) {
  using namespace semver_internal;
  SemVer version;
  if (!ReadNumber(&text, &version.major)) return false;
  int n = 1;
  if (text.starts_with('.')) {
    text.remove_prefix(1);
    if (!ReadNumber(&text, &version.minor)) return false;
    n = 2;
    if (text.starts_with('.')) {
      text.remove_prefix(1);
      if (!ReadNumber(&text, &version.patch)) return false;
      n = 3;
    }
  }
  if (const size_t plus = text.find('+'); plus != std::string_view::npos) {
    if (!IdentifiersOk(text.substr(plus + 1), false)) return false;
    text = text.substr(0, plus);
  }
  if (text.starts_with('-')) {
    text.remove_prefix(1);
    if (!IdentifiersOk(text, true)) return false;
    version.prerelease = std::string(text);
    text = {};
  }
  if (!text.empty()) return false;
  *out = std::move(version);
  if (parts) *parts = n;
  return true;
}

class SemVerRange {
 public:
  // False when the text is not a range. A bare version is not one: it is looked up as written.
  static bool Parse(std::string_view text, SemVerRange* out) {
    out->bounds_.clear();
    bool any = false;
    while (true) {
      const size_t begin = text.find_first_not_of(" ,");
      if (begin == std::string_view::npos) return any;
      text.remove_prefix(begin);
      size_t op_end = 0;
      while (op_end < text.size() && std::string_view("^~<>=").find(text[op_end]) != std::string_view::npos) ++op_end;
      const std::string_view op = text.substr(0, op_end);
      text.remove_prefix(op_end);
      text.remove_prefix(std::min(text.find_first_not_of(' '), text.size()));
      const size_t end = std::min(text.find_first_of(" ,"), text.size());
      if (!out->AddTerm(op, text.substr(0, end))) return false;
      text.remove_prefix(end);
      any = true;
    }
  }

  bool Matches(const SemVer& version) const {
    bool prerelease_named = version.prerelease.empty();
    for (const Bound& bound : bounds_) {
      const int order = Compare(version, bound.version);
      const bool ok = bound.op == Op::kGe   ? order >= 0
                      : bound.op == Op::kGt ? order > 0
                      : bound.op == Op::kLe ? order <= 0
                      : bound.op == Op::kLt ? order < 0
                                            : order == 0;
      if (!ok) return false;
      if (!bound.version.prerelease.empty() && bound.version.SameCore(version)) prerelease_named = true;
    }
    return prerelease_named;
  }

 private:
  enum class Op : uint8_t { kGe, kGt, kLe, kLt, kEq };
  struct Bound {
    Op op;
    SemVer version;
  };

  bool AddTerm(std::string_view op, std::string_view text) {
    if (text == "*" || text == "x") {
      if (!op.empty()) return false;
      bounds_.push_back({Op::kGe, SemVer{}});
      return true;
    }
    if (op.empty()) {
      if (!text.ends_with(".x") && !text.ends_with(".*")) return false;
      text.remove_suffix(2);
      SemVer low;
      int parts = 0;
      if (!ParseSemVer(text, &low, &parts) || parts > 2 || !low.prerelease.empty()) return false;
      return AddUpTo(std::move(low), parts == 1 ? 1 : 2);
    }
    SemVer low;
    int parts = 0;
    if (!ParseSemVer(text, &low, &parts)) return false;
    if (op == "^") return AddUpTo(low, low.major > 0 || parts == 1 ? 1 : low.minor > 0 || parts == 2 ? 2 : 3);
    if (op == "~") return AddUpTo(low, parts == 1 ? 1 : 2);
    const Op known = op == ">=" ? Op::kGe : op == ">" ? Op::kGt : op == "<=" ? Op::kLe : op == "<" ? Op::kLt : Op::kEq;
    if (known == Op::kEq && op != "=" && op != "==") return false;
    bounds_.push_back({known, std::move(low)});
    return true;
  }

  // From `low` to below the next version that differs in one of the first `numbers` numbers. After the largest of all
  // there is none, and no bound above.
  bool AddUpTo(SemVer low, int numbers) {
    SemVer high{low.major, numbers > 1 ? low.minor : 0, numbers > 2 ? low.patch : 0, ""};
    if (numbers > 2 && ++high.patch == 0) numbers = 2;
    if (numbers == 2 && ++high.minor == 0) numbers = 1;
    const bool bounded = numbers > 1 || ++high.major != 0;
    bounds_.push_back({Op::kGe, std::move(low)});
    if (bounded) bounds_.push_back({Op::kLt, std::move(high)});
    return true;
  }

  std::vector<Bound> bounds_;
};

}  // namespace tidegate
