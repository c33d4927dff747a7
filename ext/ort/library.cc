#include "ort/library.h"

#include <dlfcn.h>
#include <malloc.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <mutex>

#include "util/clock.h"
#include "util/log.h"
#include "util/utf8.h"

namespace tidegate::ort {
namespace {

Api the_api;                                 // constant after Open
std::atomic<Library*> the_library{nullptr};  // release in Open, acquire in Get
std::mutex open_mutex;

// -- recording --------------------------------------------------------------------------------------------------------

void* const* recorded_table = nullptr;  // constant after Open
std::array<std::atomic<uint64_t>, kSlotsEnd> recorded_calls;

template <int kNumber, typename Type>
struct Recorder;

template <int kNumber, typename Result, typename... Arguments>
struct Recorder<kNumber, Result(Arguments...)> {
  static Result Call(Arguments... arguments) {
    recorded_calls[kNumber].fetch_add(1, std::memory_order_relaxed);
    return reinterpret_cast<Result (*)(Arguments...)>(recorded_table[kNumber])(arguments...);
  }
};

Api RecordingApi() {
  Api api;
#define TIDEGATE_SLOT(number, name, ...) api.name = &Recorder<number, __VA_ARGS__>::Call;
  TIDEGATE_ORT_SLOTS(TIDEGATE_SLOT)
#undef TIDEGATE_SLOT
  return api;
}

// -- logging ----------------------------------------------------------------------------------------------------------

// The runtime writes a record for each run that fails, so callers decide how many there are: past this many in a second
// they are counted and the count is logged with the next one.
constexpr int64_t kMaxRecordsPerSecond = 20;

bool AdmitRecord(uint64_t* n_left_out) {
  static std::atomic<int64_t> second{0};
  static std::atomic<int64_t> in_second{0};
  static std::atomic<uint64_t> left_out{0};
  const int64_t now = NowNs() / 1'000'000'000;
  if (second.exchange(now, std::memory_order_relaxed) != now) in_second.store(0, std::memory_order_relaxed);
  if (in_second.fetch_add(1, std::memory_order_relaxed) >= kMaxRecordsPerSecond) {
    left_out.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  *n_left_out = left_out.exchange(0, std::memory_order_relaxed);
  return true;
}

void WriteLog(void*, int severity, const char* category, const char* log_id, const char* location,
              const char* message) {
  const LogLevel level = severity <= kVerbose   ? LogLevel::kDebug
                         : severity == kInfo    ? LogLevel::kInfo
                         : severity == kWarning ? LogLevel::kWarning
                                                : LogLevel::kError;
  uint64_t n_left_out = 0;
  if (!LogEnabled(level) || !AdmitRecord(&n_left_out)) return;
  const auto text = [](const char* c) { return c ? std::string_view(c) : std::string_view(); };
  if (n_left_out == 0) {
    Log(level, "onnxruntime", text(message),
        {{"category", text(category)}, {"log_id", text(log_id)}, {"location", text(location)}});
  } else {
    Log(level, "onnxruntime", text(message),
        {{"category", text(category)}, {"location", text(location)}, {"left_out", std::to_string(n_left_out)}});
  }
}

// -- messages ---------------------------------------------------------------------------------------------------------

// `file.cc:123`, what the runtime's own checks put in front of their message.
bool IsSourceLocation(std::string_view token) {
  const size_t colon = token.rfind(':');
  if (colon == std::string_view::npos || colon + 1 == token.size()) return false;
  for (char c : token.substr(colon + 1)) {
    if (!std::isdigit(static_cast<unsigned char>(c))) return false;
  }
  const std::string_view file = token.substr(0, colon);
  return file.ends_with(".cc") || file.ends_with(".h") || file.ends_with(".cpp") || file.ends_with(".cu");
}

bool IsPathStart(std::string_view text) {
  return text.starts_with('/') || text.starts_with("./") || text.starts_with("../");
}

// What a path may stand behind without a blank.
bool IsOpening(char c) { return std::string_view("\"'`([{<:;=,|").find(c) != std::string_view::npos; }

bool IsOnlyOpening(std::string_view text) { return std::all_of(text.begin(), text.end(), IsOpening); }

// Whether what follows this text is the name of a node, such as /encoder/layer.0/Gather, which keeps its slashes.
bool SaysNode(std::string_view text) {
  while (!text.empty() && IsOpening(text.back())) text.remove_suffix(1);
  return text.ends_with("node") || text.ends_with("Node");
}

void ReplaceAll(std::string* text, std::string_view from, std::string_view to) {
  for (size_t at = text->find(from); at != std::string::npos; at = text->find(from, at + to.size())) {
    text->replace(at, from.size(), to);
  }
}

// Cuts what follows the last whole character within `size` bytes.
void CutText(std::string* text, size_t size) {
  if (text->size() <= size) return;
  while (size > 0 && (static_cast<uint8_t>((*text)[size]) & 0xC0) == 0x80) --size;
  text->resize(size);
}

}  // namespace

std::string CleanMessage(std::string_view message, const std::vector<std::string>& folders) {
  std::string text;
  text.reserve(message.size());
  // Whatever separates words becomes one space: the message is one line of a status and of a log.
  for (std::string_view left = message; !left.empty();) {
    const size_t length = Utf8Length(left);
    const bool is_blank = static_cast<uint8_t>(left[0]) <= 0x20 || left[0] == 0x7F;
    if (length == 0) {
      text += kReplacementCharacter;
    } else if (!is_blank) {
      text += left.substr(0, length);
    } else if (!text.empty() && text.back() != ' ') {
      text += ' ';
    }
    left.remove_prefix(std::max<size_t>(length, 1));
  }
  for (const std::string& folder : folders) {
    if (folder.size() > 1) ReplaceAll(&text, folder + "/", "");
  }

  std::string clean;
  clean.reserve(text.size());
  std::string_view rest = text;
  while (!rest.empty()) {
    const size_t space = rest.find(' ');
    std::string_view token = rest.substr(0, space);
    rest.remove_prefix(space == std::string_view::npos ? rest.size() : space + 1);

    size_t path = 0;
    while (path < token.size() && !(IsPathStart(token.substr(path)) && (path == 0 || IsOpening(token[path - 1]))))
      ++path;
    std::string kept(token.substr(0, path));
    const bool is_node = kept.ends_with("Name:'") || SaysNode(IsOnlyOpening(kept) ? clean : kept);
    if (path < token.size() && !is_node) {
      const std::string_view tail = token.substr(path);
      const std::string_view base = tail.substr(tail.rfind('/') + 1);
      if (!IsSourceLocation(base)) kept += base;
    } else {
      kept += token.substr(path);
    }
    if (kept.empty()) continue;
    if (!clean.empty()) clean += ' ';
    clean += kept;
  }
  if (clean.size() > kMaxMessage) {
    CutText(&clean, kMaxMessage - 3);
    clean += "...";
  }
  return clean;
}

const Api& api() { return the_api; }

const Library* Library::Get() { return the_library.load(std::memory_order_acquire); }

uint64_t Library::calls(int number) {
  return number >= 0 && number < kSlotsEnd ? recorded_calls[number].load(std::memory_order_relaxed) : 0;
}

Status ToStatus(OrtStatus* status, Reason reason) {
  if (status == nullptr) return Status::Ok();
  std::string message = CleanMessage(the_api.GetErrorMessage(status));
  if (message.empty()) message = "ONNX Runtime gave no reason";
  the_api.ReleaseStatus(status);
  return Status::Error(reason, std::move(message));
}

Status Library::Open(const std::string& path, bool record_calls) {
  std::lock_guard lock(open_mutex);
  if (const Library* open = Get()) {
    if (open->path_ == path) return Status::Ok();
    return Status::Error(Reason::kLoadFailed,
                         "ONNX Runtime " + open->version_ + " is already open; a process has one runtime");
  }
  auto library = std::make_unique<Library>();
  if (Status status = library->Load(path, record_calls); !status.ok()) return status;
  the_library.store(library.release(), std::memory_order_release);
  return Status::Ok();
}

Status Library::Load(const std::string& path, bool record_calls) {
  // From this size on a block is a mapping of its own, which goes back to the system when it is freed. glibc raises the
  // threshold to whatever was freed last, up to 32 MiB; then weights lie between small blocks of everybody, and one
  // that stays keeps tens of megabytes. A message above it costs a mapping; pooled buffers are no larger anyway.
  mallopt(M_MMAP_THRESHOLD, 4 << 20);
  // Local: other extension modules of the interpreter must not resolve their symbols against it.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* error = dlerror();
    return Status::Error(Reason::kLoadFailed,
                         "ONNX Runtime's library cannot be opened: " + CleanMessage(error ? error : "no reason given"));
  }
  const auto get_base = reinterpret_cast<const ApiBase* (*)()>(dlsym(handle, "OrtGetApiBase"));
  if (get_base == nullptr) {
    dlclose(handle);
    return Status::Error(Reason::kLoadFailed, "the library is not ONNX Runtime: it has no OrtGetApiBase");
  }
  const ApiBase* base = get_base();
  version_ = base->GetVersionString();
  void* const* table = base->GetApi(kApiVersion);
  if (table == nullptr) {
    const std::string found = version_;
    dlclose(handle);
    return Status::Error(Reason::kLoadFailed, "ONNX Runtime " + found + " is too old; install 1." +
                                                  std::to_string(kApiVersion) + " or newer");
  }
  // From here on the library stays: its code may run on threads that it started.
  recorded_table = table;
  the_api = record_calls ? RecordingApi() : ApiFromTable(table);
  path_ = path;

  constexpr Reason kReason = Reason::kLoadFailed;
  TIDEGATE_ORT_TRY(the_api.CreateEnvWithCustomLogger(&WriteLog, nullptr, kWarning, "tidegate", &env_), kReason);
  TIDEGATE_ORT_TRY(the_api.GetAllocatorWithDefaultOptions(&allocator_), kReason);
  OrtMemoryInfo* cpu_memory = nullptr;
  TIDEGATE_ORT_TRY(the_api.CreateMemoryInfo("Cpu", kDeviceAllocator, 0, kDefaultMemory, &cpu_memory), kReason);
  cpu_memory_ = cpu_memory;

  char** names = nullptr;
  int n_names = 0;
  TIDEGATE_ORT_TRY(the_api.GetAvailableProviders(&names, &n_names), kReason);
  providers_.assign(names, names + n_names);
  TIDEGATE_ORT_TRY(the_api.ReleaseAvailableProviders(names, n_names), kReason);
  return Status::Ok();
}

}  // namespace tidegate::ort
