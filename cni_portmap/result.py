"""A result in the form of another cniVersion, as libcni converts it.

Loaded only where a plugin has answered in another version than the configuration's. Forms are named by the newest
version that has them: 0.2.0 (`ip4` and `ip6`), 0.4.0 (`interfaces` and `ips`, each with its `version`), 1.1.0 (`ips`
without). What the next form cannot say is lost there; keys that no version knows are kept where both forms have a place
for them. Source: containernetworking/cni, pkg/types/020, 040 and 100; spec-v0.2.0, spec-v0.4.0 and SPEC.md 1.1.0.
"""
import json
from typing import Any

from .attachment import parse_cidr
from .cni import INVALID_CONFIG, CniError, ConfigError

Result = dict[str, Any]
FAMILIES = {"ip4": 4, "ip6": 6}
NEW_IN_1_0 = ("mtu", "socketPath", "pciID")  # of an interface


def convert(raw: str, form: str, wanted: str, version: str) -> str:
    """The result `raw` (JSON text) of one form, in the form `wanted` and with the number `version`.

    Raises CniError(7) where it is not as its form has it.
    """
    result: Result = json.loads(raw)
    if form == "0.2.0":
        result = _from_0_2(result)
    if wanted == "0.2.0":
        result = _to_0_2(result)
    else:
        _set_versions(result, wanted == "0.4.0")
    try:
        return json.dumps({**result, "cniVersion": version}, separators=(",", ":"), allow_nan=False)
    except ValueError:  # 1e999
        raise CniError(INVALID_CONFIG, "prevResult has a number that is too large", "expected one that fits a double") \
            from None


def _from_0_2(result: Result) -> Result:
    ips, routes = [], []
    for key in FAMILIES:
        config = result.pop(key, None)
        if config:  # it has an ip, see `config`
            ips.append({"address": config.pop("ip"), **{name: value for name, value in config.items()
                                                       if name != "routes"}})
            routes += _objects(config.get("routes"), f"prevResult.{key}.routes")
    return {**result, "ips": ips, "routes": routes}


def _to_0_2(result: Result) -> Result:
    """Only the first address of each family, with the routes of that family."""
    ips = _objects(result.pop("ips", None), "prevResult.ips")
    routes = _objects(result.pop("routes", None), "prevResult.routes")
    result.pop("interfaces", None)
    for key, family in FAMILIES.items():
        mine = [entry for entry in ips if _family(entry, "address", "prevResult.ips") == family]
        theirs = [route for route in routes if _family(route, "dst", "prevResult.routes") == family]
        if mine:
            result[key] = {"ip": mine[0]["address"], **{name: value for name, value in mine[0].items()
                                                       if name not in ("address", "version", "interface")}}
            if theirs:
                result[key]["routes"] = [{name: route[name] for name in ("dst", "gw") if name in route}
                                         for route in theirs]
    return result


def _set_versions(result: Result, has_them: bool) -> None:
    for entry in _objects(result.get("ips"), "prevResult.ips"):
        entry.pop("version", None)
        if has_them:
            entry["version"] = str(_family(entry, "address", "prevResult.ips"))
    if has_them:
        for interface in _objects(result.get("interfaces"), "prevResult.interfaces"):
            for name in NEW_IN_1_0:
                interface.pop(name, None)


def _family(entry: Result, key: str, path: str) -> int:
    return parse_cidr(entry.get(key), path).family


def _objects(value: object, path: str) -> list[Result]:
    """A list of objects, empty for null; a null in it stands for nothing."""
    if value is None:
        return []
    if type(value) is not list:
        raise ConfigError(path)
    found = [item for item in value if item is not None]
    if not all(type(item) is dict for item in found):
        raise ConfigError(path, "a list of objects")
    return found
