"""KServe's Python model server with a model that does nothing; runs in KServe's own environment.

kserve_nothing.py GRPC_PORT HTTP_PORT
"""

import sys
from typing import Any

import numpy as np
from kserve import InferOutput, InferResponse, Model, ModelServer


class Nothing(Model):  # type: ignore[misc] # nothing is known of it here
    """Looks at its inputs and answers zeros."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.ready = True

    def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> Any:
        """Answers one request."""
        rows = [len(tensor.as_numpy()) for tensor in payload.inputs]
        output = InferOutput("probabilities", [rows[0], 10], "FP32")
        output.set_data_from_numpy(np.zeros((rows[0], 10), np.float32))
        return InferResponse(payload.id, self.name, [output])


if __name__ == "__main__":
    ModelServer(grpc_port=int(sys.argv[1]), http_port=int(sys.argv[2]), workers=1).start([Nothing("nothing")])
