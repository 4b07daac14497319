"""The reason for a refused configuration, from the schema: the JSON path, the value, and what was expected.

Off the hot path: jsonschema takes 70 ms to import, so only a refused call pays for it.
"""
import json
import pathlib
import pkgutil
from collections.abc import Iterator

from . import cni, see_packages
from .attachment import parse_cidr, parse_ip
from .cni import INVALID_CONFIG, CniError, ConfigError
from .conditions import parse_conditions
from .config import KEYS, is_consistent
from .exposure import read

SCHEMA = pathlib.Path(__file__).with_name("portmap.schema.json")


def explain(config: dict[str, object], error: ConfigError) -> CniError:
    """The error for a runtime that sent `config`: with the value, and what the schema expects in its place."""
    if error.reason:
        return CniError(INVALID_CONFIG, _problem(error.path, _value_at(config, error.path)), f"expected {error.reason}")
    try:
        path, value, expected = next(violations(config))
    except (ImportError, StopIteration):  # jsonschema is missing, or finds nothing: the parser's word stands
        return error
    return CniError(INVALID_CONFIG, _problem(path, value), f"expected {expected}")


def _problem(path: str, value: object) -> str:
    return f"{path}: missing" if value is None else f"invalid value for {path}: {_shorten(value)}"


def violations(config: object) -> "Iterator[tuple[str, object, str]]":
    """Each place where `config` breaks the schema: JSON path, value, what was expected."""
    see_packages()
    import jsonschema
    checker = jsonschema.FormatChecker(formats=())
    checks = {
        "hostIP": lambda value: type(value) is not str or value == "" or parse_ip(value, ""),
        "cidr": lambda value: type(value) is not str or parse_cidr(value, ""),
        "conditionsV4": lambda value: parse_conditions(value, "conditionsV4") if type(value) is list else "",
        "conditionsV6": lambda value: parse_conditions(value, "conditionsV6") if type(value) is list else "",
        "address": lambda value: type(value) is not str or parse_ip(value, ""),
        "outgoingSourceV4": lambda value: type(value) is not str or read(value, "outgoingSourceV4"),
        "outgoingSourceV6": lambda value: type(value) is not str or read(value, "outgoingSourceV6"),
        "consistent": lambda value: type(value) is not dict or is_consistent(value),
    }
    for name, check in checks.items():
        checker.checks(name, raises=ConfigError)(lambda value, check=check: check(value) is not None)
    root = json.loads(pkgutil.get_data(__name__, SCHEMA.name) or "")  # from a folder or, in the bundle, a zip
    validator = jsonschema.Draft7Validator(root, format_checker=checker)
    if type(config) is dict:
        config = cni.as_go_reads(config, {*cni.KEYS, *KEYS})
    errors = [leaf for error in validator.iter_errors(config) for leaf in (error.context or [error])]
    # The deepest first: it names the value, where the list around it only says that something in it is wrong.
    for error in sorted(errors, key=lambda error: -len(error.absolute_path)):
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.absolute_path)
        schema, reason = error.schema, getattr(error.cause, "reason", "")
        if error.validator == "required":
            missing = next(key for key in error.validator_value if key not in error.instance)
            part = schema.get("properties", {}).get(missing, {})
            part = root["definitions"].get(part.get("$ref", "").rpartition("/")[2], part)
            path, expected, value = f"{path}.{missing}", _description(part), None
        elif error.validator == "not" and "description" in schema["not"]:
            expected, value = schema["not"]["description"], error.instance
        else:
            expected, value = reason or _description(schema), error.instance
            if not path:  # the values that contradict each other are somewhere in it
                path = getattr(error.cause, "path", "")
                value = _value_at(config, path) if path else value
        yield path.lstrip(".") or "the configuration", value, expected


def _description(schema: dict[str, object]) -> str:
    if "not" in schema and "description" not in schema:
        return "an object with hostPort and containerPort"
    return str(schema.get("description", "a value that fits the schema"))


def _value_at(config: object, path: str) -> object:
    for step in path.replace("[", ".[").split("."):
        try:
            config = config[int(step[1:-1])] if step[0] == "[" else config[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None
    return config


def _shorten(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:76] + " ..."
