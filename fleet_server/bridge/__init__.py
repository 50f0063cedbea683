"""HTTP and WebSockets to gRPC services, by google.api.http rules. Knows descriptors and nothing of the product."""

from fleet_server.bridge.context import InProcContext
from fleet_server.bridge.httprule import Binding, HttpRuleError, rules_of
from fleet_server.bridge.invoker import Invoker
from fleet_server.bridge.routes import RouteError, Router
from fleet_server.bridge.settings import BridgeSettings
from fleet_server.bridge.special import SpecialRoute
from fleet_server.bridge.template import TemplateError, parse_template
from fleet_server.bridge.transcoder import Bridge

__all__ = [
    "Binding",
    "Bridge",
    "BridgeSettings",
    "HttpRuleError",
    "InProcContext",
    "Invoker",
    "RouteError",
    "Router",
    "SpecialRoute",
    "TemplateError",
    "parse_template",
    "rules_of",
]
