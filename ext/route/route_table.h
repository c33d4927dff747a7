// Which version answers a request: (model name, version text) -> version, or a refusal that says what is live.
//
// Owner      Immutable once built. The front end swaps the pointer and frees the old table when no I/O thread can see
// it. Threads    Any number of readers without a lock.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "route/semver.h"
#include "util/status.h"

namespace tidegate {

class Version;

struct VersionRoute {
  std::string text;                  // as on the wire
  std::shared_ptr<Version> version;  // null: named, but not READY here
  std::string reason;                // why not
};

struct ModelRoute {
  std::string name;
  std::vector<VersionRoute> versions;
  std::string default_version;                               // what an empty model_version means; "": nothing is READY
  std::vector<std::pair<std::string, std::string>> aliases;  // alias -> version text
};

class RouteTable {
 public:
  explicit RouteTable(std::vector<ModelRoute> models);
  ~RouteTable();
  RouteTable(const RouteTable&) = delete;
  RouteTable& operator=(const RouteTable&) = delete;

  // An empty version means the default; otherwise the exact text, an alias, or a range (its highest READY version).
  // On success *version is valid while this table is. kModelNotFound, kVersionNotFound, kVersionNotReady otherwise.
  Status Resolve(std::string_view model, std::string_view version_text, Version** version) const;

  const std::vector<ModelRoute>& models() const { return models_; }

 private:
  struct Entry {
    const ModelRoute* route = nullptr;
    Version* default_version = nullptr;
    std::unordered_map<std::string_view, const VersionRoute*> by_text;  // versions, then aliases
    std::vector<std::pair<SemVer, const VersionRoute*>> ordered;        // highest first
  };
  static Status NotFound(const Entry& entry, std::string_view version_text);

  const std::vector<ModelRoute> models_;
  std::unordered_map<std::string_view, Entry> by_name_;  // keys point into models_
};

}  // namespace tidegate
