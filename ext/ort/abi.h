// The part of ONNX Runtime's C API that we call, in our own words: the runtime's packages ship the library, not its
// header.
//
// The library hands out a table of function pointers that only ever grows at its end, so a slot's number is its
// identity. TIDEGATE_ORT_SLOTS is the one list of what we use: the struct of typed pointers, the list that tests walk
// and the recorder that counts calls (library.cc) all come from it. A slot declared here that no test reaches is a
// defect.
//
// Conventions of the table: a function returns null for success or a status to be released, unless the list says
// otherwise; results come through the last arguments; Release* takes null.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace tidegate::ort {

// The table's version that we ask for: the lowest with every slot below, so that older and newer libraries both serve.
inline constexpr uint32_t kApiVersion = 17;

// Handles. Never defined: the library knows what is behind them.
struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtIoBinding;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTypeInfo;
struct OrtTensorInfo;
struct OrtModelMetadata;
struct OrtCudaOptions;
struct OrtTensorRtOptions;
struct OrtThread;

enum Severity : int { kVerbose = 0, kInfo = 1, kWarning = 2, kError = 3, kFatal = 4 };
enum ExecutionMode : int { kSequential = 0, kParallel = 1 };
enum AllocatorKind : int { kDeviceAllocator = 0, kArenaAllocator = 1 };
enum MemoryKind : int { kCpuOutputMemory = -1, kDefaultMemory = 0 };

using LogFn = void(void* param, int severity, const char* category, const char* log_id, const char* location,
                   const char* message);
using ThreadBody = void(void* argument);
using CreateThreadFn = const OrtThread*(void* options, ThreadBody* body, void* argument);
using JoinThreadFn = void(const OrtThread* thread);

// SLOT(number, name, type)
// clang-format off
#define TIDEGATE_ORT_SLOTS(SLOT)                                                                                        \
  SLOT(2, GetErrorMessage, const char*(const OrtStatus*))                           /* returns the text */             \
  SLOT(4, CreateEnvWithCustomLogger, OrtStatus*(LogFn*, void*, int, const char*, OrtEnv**))                            \
  SLOT(7, CreateSession, OrtStatus*(const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**))               \
  SLOT(10, CreateSessionOptions, OrtStatus*(OrtSessionOptions**))                                                      \
  SLOT(13, SetSessionExecutionMode, OrtStatus*(OrtSessionOptions*, int))                                               \
  SLOT(16, EnableMemPattern, OrtStatus*(OrtSessionOptions*))                                                           \
  SLOT(17, DisableMemPattern, OrtStatus*(OrtSessionOptions*))                                                          \
  SLOT(18, EnableCpuMemArena, OrtStatus*(OrtSessionOptions*))                                                          \
  SLOT(19, DisableCpuMemArena, OrtStatus*(OrtSessionOptions*))                                                         \
  SLOT(23, SetSessionGraphOptimizationLevel, OrtStatus*(OrtSessionOptions*, int))                                      \
  SLOT(24, SetIntraOpNumThreads, OrtStatus*(OrtSessionOptions*, int))                                                  \
  SLOT(25, SetInterOpNumThreads, OrtStatus*(OrtSessionOptions*, int))                                                  \
  SLOT(30, SessionGetInputCount, OrtStatus*(const OrtSession*, size_t*))                                               \
  SLOT(31, SessionGetOutputCount, OrtStatus*(const OrtSession*, size_t*))                                              \
  SLOT(33, SessionGetInputTypeInfo, OrtStatus*(const OrtSession*, size_t, OrtTypeInfo**))                              \
  SLOT(34, SessionGetOutputTypeInfo, OrtStatus*(const OrtSession*, size_t, OrtTypeInfo**))                             \
  SLOT(36, SessionGetInputName, OrtStatus*(const OrtSession*, size_t, OrtAllocator*, char**))                          \
  SLOT(37, SessionGetOutputName, OrtStatus*(const OrtSession*, size_t, OrtAllocator*, char**))                         \
  SLOT(39, CreateRunOptions, OrtStatus*(OrtRunOptions**))                                                              \
  SLOT(46, RunOptionsSetTerminate, OrtStatus*(OrtRunOptions*))                                                         \
  SLOT(48, CreateTensorAsOrtValue, OrtStatus*(OrtAllocator*, const int64_t*, size_t, int, OrtValue**))                 \
  SLOT(49, CreateTensorWithDataAsOrtValue,                                                                             \
       OrtStatus*(const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, int, OrtValue**))                       \
  SLOT(51, GetTensorMutableData, OrtStatus*(OrtValue*, void**))                                                        \
  SLOT(53, GetStringTensorDataLength, OrtStatus*(const OrtValue*, size_t*))                                            \
  SLOT(54, GetStringTensorContent, OrtStatus*(const OrtValue*, void*, size_t, size_t*, size_t))                        \
  SLOT(55, CastTypeInfoToTensorInfo, OrtStatus*(const OrtTypeInfo*, const OrtTensorInfo**))                            \
  SLOT(60, GetTensorElementType, OrtStatus*(const OrtTensorInfo*, int*))                                               \
  SLOT(61, GetDimensionsCount, OrtStatus*(const OrtTensorInfo*, size_t*))                                              \
  SLOT(62, GetDimensions, OrtStatus*(const OrtTensorInfo*, int64_t*, size_t))                                          \
  SLOT(63, GetSymbolicDimensions, OrtStatus*(const OrtTensorInfo*, const char**, size_t))                              \
  SLOT(65, GetTensorTypeAndShape, OrtStatus*(const OrtValue*, OrtTensorInfo**))                                        \
  SLOT(68, CreateMemoryInfo, OrtStatus*(const char*, int, int, int, OrtMemoryInfo**))                                  \
  SLOT(75, AllocatorAlloc, OrtStatus*(OrtAllocator*, size_t, void**))                                                  \
  SLOT(76, AllocatorFree, OrtStatus*(OrtAllocator*, void*))                                                            \
  SLOT(78, GetAllocatorWithDefaultOptions, OrtStatus*(OrtAllocator**))                                                 \
  SLOT(93, ReleaseStatus, void(OrtStatus*))                                                                            \
  SLOT(94, ReleaseMemoryInfo, void(OrtMemoryInfo*))                                                                    \
  SLOT(95, ReleaseSession, void(OrtSession*))                                                                          \
  SLOT(96, ReleaseValue, void(OrtValue*))                                                                              \
  SLOT(97, ReleaseRunOptions, void(OrtRunOptions*))                                                                    \
  SLOT(98, ReleaseTypeInfo, void(OrtTypeInfo*))                                                                        \
  SLOT(99, ReleaseTensorTypeAndShapeInfo, void(OrtTensorInfo*))                                                        \
  SLOT(100, ReleaseSessionOptions, void(OrtSessionOptions*))                                                           \
  SLOT(111, SessionGetModelMetadata, OrtStatus*(const OrtSession*, OrtModelMetadata**))                                \
  SLOT(116, ModelMetadataLookupCustomMetadataMap,                                                                      \
       OrtStatus*(const OrtModelMetadata*, OrtAllocator*, const char*, char**))                                        \
  SLOT(118, ReleaseModelMetadata, void(OrtModelMetadata*))                                                             \
  SLOT(125, GetAvailableProviders, OrtStatus*(char***, int*))                                                          \
  SLOT(126, ReleaseAvailableProviders, OrtStatus*(char**, int))                                                        \
  SLOT(130, AddSessionConfigEntry, OrtStatus*(OrtSessionOptions*, const char*, const char*))                           \
  SLOT(131, CreateAllocator, OrtStatus*(const OrtSession*, const OrtMemoryInfo*, OrtAllocator**))                      \
  SLOT(132, ReleaseAllocator, void(OrtAllocator*))                                                                     \
  SLOT(133, RunWithBinding, OrtStatus*(OrtSession*, const OrtRunOptions*, const OrtIoBinding*))                        \
  SLOT(134, CreateIoBinding, OrtStatus*(OrtSession*, OrtIoBinding**))                                                  \
  SLOT(135, ReleaseIoBinding, void(OrtIoBinding*))                                                                     \
  SLOT(136, BindInput, OrtStatus*(OrtIoBinding*, const char*, const OrtValue*))                                        \
  SLOT(137, BindOutput, OrtStatus*(OrtIoBinding*, const char*, const OrtValue*))                                       \
  SLOT(138, BindOutputToDevice, OrtStatus*(OrtIoBinding*, const char*, const OrtMemoryInfo*))                          \
  SLOT(140, GetBoundOutputValues, OrtStatus*(const OrtIoBinding*, OrtAllocator*, OrtValue***, size_t*))                \
  SLOT(141, ClearBoundInputs, void(OrtIoBinding*))                                                                     \
  SLOT(165, AddRunConfigEntry, OrtStatus*(OrtRunOptions*, const char*, const char*))                                   \
  SLOT(170, AppendTensorRt, OrtStatus*(OrtSessionOptions*, const OrtTensorRtOptions*))                                 \
  SLOT(171, CreateTensorRtOptions, OrtStatus*(OrtTensorRtOptions**))                                                   \
  SLOT(172, UpdateTensorRtOptions, OrtStatus*(OrtTensorRtOptions*, const char* const*, const char* const*, size_t))    \
  SLOT(174, ReleaseTensorRtOptions, void(OrtTensorRtOptions*))                                                         \
  SLOT(196, SetCustomCreateThread, OrtStatus*(OrtSessionOptions*, CreateThreadFn*))                                    \
  SLOT(197, SetCustomThreadOptions, OrtStatus*(OrtSessionOptions*, void*))                                             \
  SLOT(198, SetCustomJoinThread, OrtStatus*(OrtSessionOptions*, JoinThreadFn*))                                        \
  SLOT(202, SynchronizeBoundInputs, OrtStatus*(OrtIoBinding*))                                                         \
  SLOT(203, SynchronizeBoundOutputs, OrtStatus*(OrtIoBinding*))                                                        \
  SLOT(204, AppendCuda, OrtStatus*(OrtSessionOptions*, const OrtCudaOptions*))                                         \
  SLOT(205, CreateCudaOptions, OrtStatus*(OrtCudaOptions**))                                                           \
  SLOT(206, UpdateCudaOptions, OrtStatus*(OrtCudaOptions*, const char* const*, const char* const*, size_t))            \
  SLOT(208, ReleaseCudaOptions, void(OrtCudaOptions*))                                                                 \
  SLOT(216, AppendProvider,                                                                                            \
       OrtStatus*(OrtSessionOptions*, const char*, const char* const*, const char* const*, size_t))                    \
  SLOT(252, GetResizedStringTensorElementBuffer, OrtStatus*(OrtValue*, size_t, size_t, char**))
// clang-format on

// The table as typed pointers.
struct Api {
#define TIDEGATE_SLOT(number, name, ...) std::add_pointer_t<__VA_ARGS__> name = nullptr;
  TIDEGATE_ORT_SLOTS(TIDEGATE_SLOT)
#undef TIDEGATE_SLOT
};

struct SlotName {
  int number;
  const char* name;
};

inline constexpr SlotName kSlots[] = {
#define TIDEGATE_SLOT(number, name, ...) {number, #name},
    TIDEGATE_ORT_SLOTS(TIDEGATE_SLOT)
#undef TIDEGATE_SLOT
};
inline constexpr int kSlotsEnd = 253;  // one past the highest number above

// REQUIRES: `table` has every slot of kApiVersion.
inline Api ApiFromTable(void* const* table) {
  Api api;
#define TIDEGATE_SLOT(number, name, ...) \
  static_assert(number < kSlotsEnd);     \
  api.name = reinterpret_cast<std::add_pointer_t<__VA_ARGS__>>(table[number]);
  TIDEGATE_ORT_SLOTS(TIDEGATE_SLOT)
#undef TIDEGATE_SLOT
  return api;
}

// What the library's only exported function returns.
struct ApiBase {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

}  // namespace tidegate::ort
