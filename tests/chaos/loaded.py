"""Loads a worker's compiled code where it is imported: in the server that workers are forked from,
or each of a hundred short-lived workers would load it for itself.
"""

from columns import DECODER

from consumers.channels import Market50
from consumers.encoding import FeatureEncoder
from consumers.windows import WindowStore
from schemas.settings import WindowSettings

STORE = WindowStore(Market50(), WindowSettings())
ENCODER = FeatureEncoder(DECODER._codec, Market50.version, ())
