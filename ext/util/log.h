// Logs of the native core: one JSON object per line on stderr, as the Python side writes them.
//
// Threads    Any. A record is one write(2) of at most kMaxLogLine bytes, so lines of different threads do not mix (on a
//            pipe up to PIPE_BUF bytes go in one piece). No lock, no allocation; a full pipe blocks the caller, so
//            nothing on the request path logs per request.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>

namespace tidegate {

// Python's numbers.
enum class LogLevel : int { kDebug = 10, kInfo = 20, kWarning = 30, kError = 40 };

struct LogField {
  std::string_view key;
  std::string_view value;
};

// PIPE_BUF on Linux. What does not fit is cut from the end of the message.
inline constexpr size_t kMaxLogLine = 4096;

// Records below this level are dropped. The initial level is kInfo.
void SetLogLevel(int level);
bool LogEnabled(LogLevel level);

// {"ts", "level", "logger", "message", ...fields}.
void Log(LogLevel level, std::string_view logger, std::string_view message,
         std::initializer_list<LogField> fields = {});

// What Log writes, newline included: returns the bytes put into `line`. Control characters are escaped and what is not
// UTF-8 becomes U+FFFD, so a line is always one line and always JSON. Fields that do not fit are left out whole.
size_t FormatLogLine(int64_t wall_ms, LogLevel level, std::string_view logger, std::string_view message,
                     std::span<const LogField> fields, std::span<char, kMaxLogLine> line);

}  // namespace tidegate
