#include "util/log.h"

#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "util/clock.h"
#include "util/utf8.h"

namespace tidegate {
namespace {

std::atomic<int> min_level{static_cast<int>(LogLevel::kInfo)};

// Appends to a fixed buffer and refuses what would not fit, whole.
class Line {
 public:
  Line(char* to, size_t capacity) : to_(to), capacity_(capacity) {}

  size_t size() const { return size_; }
  void Rewind(size_t size) { size_ = size; }

  bool Raw(std::string_view text) {
    if (text.size() > capacity_ - size_) return false;
    std::memcpy(to_ + size_, text.data(), text.size());
    size_ += text.size();
    return true;
  }

  // The inside of a JSON string. Stops at the first character that does not fit.
  bool Escaped(std::string_view text) {
    while (!text.empty()) {
      const size_t length = Utf8Length(text);
      const char c = text[0];
      bool fits;
      if (length == 0) {
        fits = Raw(kReplacementCharacter);
      } else if (c == '"' || c == '\\') {
        const char pair[2] = {'\\', c};
        fits = Raw({pair, 2});
      } else if (static_cast<uint8_t>(c) < 0x20 || c == 0x7F) {
        char code[7];
        std::snprintf(code, sizeof code, "\\u%04x", static_cast<unsigned>(c));
        fits = Raw({code, 6});
      } else {
        fits = Raw(text.substr(0, length));
      }
      if (!fits) return false;
      text.remove_prefix(length == 0 ? 1 : length);
    }
    return true;
  }

 private:
  char* to_;
  size_t capacity_;
  size_t size_ = 0;
};

std::string_view LevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug: return "debug";
    case LogLevel::kInfo: return "info";
    case LogLevel::kWarning: return "warning";
    case LogLevel::kError: return "error";
  }
  return "error";
}

}  // namespace

void SetLogLevel(int level) { min_level.store(level, std::memory_order_relaxed); }

bool LogEnabled(LogLevel level) { return static_cast<int>(level) >= min_level.load(std::memory_order_relaxed); }

size_t FormatLogLine(int64_t wall_ms, LogLevel level, std::string_view logger, std::string_view message,
                     std::span<const LogField> fields, std::span<char, kMaxLogLine> line) {
  constexpr std::string_view kEnd = "}\n";
  // Half for the message at most when fields follow, so that a long message does not push out the names beside it.
  constexpr size_t kRoom = kMaxLogLine - kEnd.size();
  const time_t seconds = static_cast<time_t>(wall_ms / 1000);
  tm utc;
  gmtime_r(&seconds, &utc);
  char ts[64];
  std::snprintf(ts, sizeof ts, "%04d-%02d-%02dT%02d:%02d:%02d.%03dZ", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday,
                utc.tm_hour, utc.tm_min, utc.tm_sec, static_cast<int>(wall_ms % 1000));

  // The closing quote is inside `message_room`'s margin, so a cut message still ends as JSON.
  Line out(line.data(), fields.empty() ? kRoom - 1 : kRoom / 2);
  out.Raw("{\"ts\":\"");
  out.Raw(ts);
  out.Raw("\",\"level\":\"");
  out.Raw(LevelName(level));
  out.Raw("\",\"logger\":\"");
  out.Escaped(logger.substr(0, 64));
  out.Raw("\",\"message\":\"");
  out.Escaped(message);
  Line rest(line.data(), kRoom);
  rest.Rewind(out.size());
  rest.Raw("\"");
  for (const LogField& field : fields) {
    const size_t before = rest.size();
    const bool fits =
        rest.Raw(",\"") && rest.Escaped(field.key) && rest.Raw("\":\"") && rest.Escaped(field.value) && rest.Raw("\"");
    if (!fits) rest.Rewind(before);
  }
  std::memcpy(line.data() + rest.size(), kEnd.data(), kEnd.size());
  return rest.size() + kEnd.size();
}

void Log(LogLevel level, std::string_view logger, std::string_view message, std::initializer_list<LogField> fields) {
  if (!LogEnabled(level)) return;
  char line[kMaxLogLine];
  const size_t size = FormatLogLine(WallMs(), level, logger, message, {fields.begin(), fields.size()}, line);
  size_t written = 0;
  while (written < size) {
    const ssize_t n = write(STDERR_FILENO, line + written, size - written);
    if (n > 0) {
      written += static_cast<size_t>(n);
    } else if (n < 0 && errno == EINTR) {
      continue;
    } else {
      return;  // Nowhere to report that reporting failed.
    }
  }
}

}  // namespace tidegate
