# Routes as Python gives them -> the values that the front end publishes.

from frontend cimport c_ModelRoute, c_VersionRoute

VersionRoute = namedtuple("VersionRoute", "text version reason")
ModelRoute = namedtuple("ModelRoute", "name versions default aliases")


cdef c_ModelRoute to_model_route(object given) except *:
    cdef c_ModelRoute route
    cdef c_VersionRoute* version
    route.name = given.name.encode()
    route.default_version = given.default.encode()
    for one in given.versions:
        route.versions.resize(route.versions.size() + 1)
        version = &route.versions.back()
        version.text = one.text.encode()
        version.reason = one.reason.encode()
        if one.version is not None:
            version.version = (<Version?>one.version).c_obj
    for alias, text in given.aliases.items():
        route.aliases.push_back(pair[string, string](<string>alias.encode(), <string>text.encode()))
    return route
