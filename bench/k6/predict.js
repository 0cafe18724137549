// Requests at a constant arrival rate, whatever became of those before, with a threshold on latency (docs/load-testing.md).
import grpc from 'k6/net/grpc';
import { check } from 'k6';
import exec from 'k6/execution';
import { SharedArray } from 'k6/data';

const address = __ENV.ADDRESS || '127.0.0.1:8001';
const requests = new SharedArray('requests', () => JSON.parse(open(`../ghz/payloads/mosel-${__ENV.KIND || 'single'}.json`)));

const client = new grpc.Client();
client.load(['../../protos'], 'mosel/v1/gateway.proto');
let connected = false;

export const options = {
  scenarios: {
    requests: {
      executor: 'constant-arrival-rate',
      rate: Number(__ENV.RATE || 50),
      timeUnit: '1s',
      duration: __ENV.DURATION || '20s',
      preAllocatedVUs: 20,
      maxVUs: 200,
    },
  },
  thresholds: {
    grpc_req_duration: [`p(95)<${__ENV.SLO_MS || 100}`],
    checks: ['rate>0.99'],
  },
};

export default function () {
  if (!connected) {
    client.connect(address, { plaintext: true });
    connected = true;
  }
  const request = requests[exec.scenario.iterationInTest % requests.length];
  const response = client.invoke('mosel.v1.Gateway/Predict', request, { timeout: '10s' });
  check(response, { 'is answered': (answer) => answer.status === grpc.StatusOK });
}
