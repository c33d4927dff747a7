#include "route/route_table.h"

#include <algorithm>

#include "serving/version.h"

namespace tidegate {
namespace {

// Client-given text in an error message: bounded, so that a message never grows with the request.
std::string Quoted(std::string_view text) {
  constexpr size_t kMost = 128;
  std::string quoted = "'";
  quoted.append(text.substr(0, kMost));
  quoted += text.size() > kMost ? "...'" : "'";
  return quoted;
}

// How many versions a refusal names; a model with more is listed elsewhere (RepositoryIndex).
constexpr size_t kVersionsNamed = 8;

}  // namespace

RouteTable::RouteTable(std::vector<ModelRoute> models) : models_(std::move(models)) {
  for (const ModelRoute& route : models_) {
    Entry& entry = by_name_[route.name];
    entry.route = &route;
    for (const VersionRoute& version : route.versions) {
      entry.by_text[version.text] = &version;
      SemVer order;
      if (ParseSemVer(version.text, &order)) entry.ordered.emplace_back(std::move(order), &version);
      if (version.version) {
        version.version->published.fetch_add(1, std::memory_order_relaxed);
        if (version.text == route.default_version) entry.default_version = version.version.get();
      }
    }
    std::stable_sort(entry.ordered.begin(), entry.ordered.end(),
                     [](const auto& a, const auto& b) { return Compare(a.first, b.first) > 0; });
    for (const auto& [alias, text] : route.aliases) {
      const auto at = entry.by_text.find(text);
      if (at != entry.by_text.end()) entry.by_text.try_emplace(alias, at->second);
    }
  }
}

RouteTable::~RouteTable() {
  for (const ModelRoute& route : models_) {
    for (const VersionRoute& version : route.versions) {
      if (version.version) version.version->published.fetch_sub(1, std::memory_order_relaxed);
    }
  }
}

Status RouteTable::NotFound(const Entry& entry, std::string_view version_text) {
  std::string live;
  size_t named = 0;
  for (const VersionRoute& version : entry.route->versions) {
    if (!version.version) continue;
    if (++named > kVersionsNamed) {
      live += ", ...";
      break;
    }
    live += (named > 1 ? ", " : "") + version.text;
  }
  return Status::Error(Reason::kVersionNotFound, "model " + Quoted(entry.route->name) + " has no version " +
                                                     Quoted(version_text) + "; live: " + (named ? live : "none"));
}

Status RouteTable::Resolve(std::string_view model, std::string_view version_text, Version** version) const {
  const auto at = by_name_.find(model);
  if (at == by_name_.end()) {
    return Status::Error(Reason::kModelNotFound,
                         "unknown model " + Quoted(model) + "; RepositoryIndex lists what is here");
  }
  const Entry& entry = at->second;
  const VersionRoute* route = nullptr;
  if (version_text.empty()) {
    if (entry.default_version) {
      *version = entry.default_version;
      return Status::Ok();
    }
    if (!entry.ordered.empty()) route = entry.ordered.front().second;
  } else if (const auto exact = entry.by_text.find(version_text); exact != entry.by_text.end()) {
    route = exact->second;
  } else if (SemVerRange range; SemVerRange::Parse(version_text, &range)) {
    for (const auto& [order, candidate] : entry.ordered) {
      if (!range.Matches(order)) continue;
      if (!route || candidate->version) route = candidate;
      if (candidate->version) break;
    }
  }
  if (!route && version_text.empty()) {
    return Status::Error(Reason::kVersionNotReady, "model " + Quoted(model) + " has no version that is ready", 1000);
  }
  if (!route) return NotFound(entry, version_text);
  if (!route->version) {
    // A second: loads take 0.1 to 10 s, and a client that waits a second wastes little of either.
    return Status::Error(Reason::kVersionNotReady,
                         "model " + Quoted(model) + " version " + Quoted(route->text) + " is not ready" +
                             (route->reason.empty() ? "" : ": " + route->reason),
                         1000);
  }
  *version = route->version.get();
  return Status::Ok();
}

}  // namespace tidegate
