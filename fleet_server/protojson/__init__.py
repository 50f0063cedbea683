"""JSON and protobuf, by converters compiled from descriptors. Pure: no clock, no I/O, nothing of the
product.
"""

from fleet_server.protojson.codec import JsonCodec
from fleet_server.protojson.defaults import apply_defaults, default_of
from fleet_server.protojson.enums import EnumNames, enum_names, enum_words
from fleet_server.protojson.errors import JsonError
from fleet_server.protojson.fields import FieldKind, Kind, field_kind, tagged_oneof
from fleet_server.protojson.json_text import dumps_exact, loads_exact
from fleet_server.protojson.loads import dumps, loads

__all__ = [
    "EnumNames",
    "FieldKind",
    "JsonCodec",
    "JsonError",
    "Kind",
    "apply_defaults",
    "default_of",
    "dumps",
    "dumps_exact",
    "enum_names",
    "enum_words",
    "field_kind",
    "loads",
    "loads_exact",
    "tagged_oneof",
]
