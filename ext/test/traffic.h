// Random gRPC traffic of one client thread, every answer checked: each request carries an id and bytes of its own, so
// that an answer that is lost, doubled, crossed or changed fails the test.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace tidegate::test {

// A "one in N" of 0 means never.
struct Traffic {
  std::vector<std::string> models;
  uint64_t calls = 500;      // in all, unless `stop` comes first
  uint32_t connections = 2;  // at a time
  uint32_t streams = 16;     // open at a time, on each
  uint32_t most_rows = 3;
  std::vector<uint32_t> columns = {1, 7, 64, 3000};

  uint32_t stream_one_in = 4;    // ModelStreamInfer with one to five messages
  uint32_t deflate_one_in = 8;   // the messages are compressed
  uint32_t pieces_one_in = 4;    // the body comes in pieces, some rounds apart
  uint32_t cancel_one_in = 0;    // RST_STREAM at a random moment
  uint32_t abort_one_in = 0;     // the whole connection is cut at a random moment, by FIN or RST
  uint32_t deadline_one_in = 0;  // a grpc-timeout of 0 to 20 ms
  uint32_t bad_one_in = 0;       // the message's first byte is kBadByte, which a "fail-on" model refuses
  // The server may be short of bytes or places: RESOURCE_EXHAUSTED is an answer, and who is slow then is cut off.
  bool may_be_refused = false;
  bool may_go = false;       // the server may be found gone, or go before it has taken a connection
  bool may_be_lost = false;  // the server may close under a call
};

// No other message begins with it.
inline constexpr uint8_t kBadByte = 0xBD;

// How the calls ended; every one is counted once.
struct Tally {
  uint64_t calls = 0;
  uint64_t answered = 0;
  uint64_t failed = 0;       // INTERNAL, as bad messages must
  uint64_t late = 0;         // DEADLINE_EXCEEDED
  uint64_t refused = 0;      // RESOURCE_EXHAUSTED
  uint64_t cancelled = 0;    // by us
  uint64_t unsent = 0;       // the server went, or said that it would go, before it heard of it
  uint64_t turned_away = 0;  // the server said that it did nothing for it
  uint64_t lost = 0;
  uint64_t messages = 0;  // inferences answered, those of streams too

  void Add(const Tally& other);
};

// Runs the traffic on the calling thread until all calls are over, or, once *stop, until the open ones are.
// `thread` makes ids unique among threads.
Tally RunTraffic(uint16_t port, const Traffic& traffic, uint32_t thread, const std::atomic<bool>* stop = nullptr);

// The same on several threads, and the sum.
Tally RunThreads(uint16_t port, const Traffic& traffic, uint32_t threads, const std::atomic<bool>* stop = nullptr);

}  // namespace tidegate::test
