# One image for every service; the command is the role: `python -m gateway`, `python -m selector`,
# `python -m encoders --modality image`, `python -m fusion`; `mosel up` runs all of them in one container.
#
#   docker build -t mosel .                                                                       CPU
#   docker build -t mosel:cuda --build-arg TORCH_INDEX= --build-arg EXTRAS="server tracing cuda13" .   NVIDIA GPUs
#
# Needs BuildKit: Docker 23 and newer use it, older ones with DOCKER_BUILDKIT=1. Where there is no network, a folder
# wheels/ beside this file takes the place of the package indexes (docs/operations.md).

# Any image with Python 3.11 or newer, venv included.
ARG BASE=python:3.11-slim

FROM ${BASE} AS tools
RUN python3 -m venv /tools
COPY constraints.txt wheels*/ /tools/wheels/
RUN printf '[global]\nconstraint = /tools/wheels/constraints.txt\nno-cache-dir = true\nroot-user-action = ignore\n' \
        > /tools/pip.conf \
    && if ls /tools/wheels/*.whl > /dev/null 2>&1; then \
        printf 'no-index = true\nfind-links = /tools/wheels\n' >> /tools/pip.conf; fi

FROM tools AS product
WORKDIR /source
ARG EXTRAS="server tracing"
COPY pyproject.toml ./
# What the product needs, apart from the product, which changes more often.
RUN python3 -c "import sys, tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
chosen = [line for extra in sys.argv[1:] for line in project['optional-dependencies'][extra]]; \
print(*project['dependencies'], *(line for line in chosen if not line.startswith(project['name'])), sep='\n')" \
    $EXTRAS > /requirements.txt
RUN /tools/bin/pip install hatchling
COPY . ./
RUN /tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /product .

FROM ${BASE}
# Of torch's own package index; empty: the usual index, which has the CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# For the commands here alone; the image has no pip.
ARG PIP_CONFIG_FILE=/tools/pip.conf
ARG PIP_PYTHON=/opt/mosel/bin/python
RUN python3 -m venv --without-pip /opt/mosel
# Large, and seldom another one, so it comes first. From its own index torch alone is taken.
RUN --mount=from=tools,source=/tools,target=/tools \
    torch=$(grep '^torch==' /tools/wheels/constraints.txt) \
    && if [ -n "$TORCH_INDEX" ]; then /tools/bin/pip install --no-deps --index-url "$TORCH_INDEX" "$torch"; fi \
    && /tools/bin/pip install "$torch"
RUN --mount=from=tools,source=/tools,target=/tools \
    --mount=from=product,source=/requirements.txt,target=/requirements.txt \
    /tools/bin/pip install --requirement /requirements.txt
RUN --mount=from=tools,source=/tools,target=/tools \
    --mount=from=product,source=/product,target=/product \
    /tools/bin/pip install --no-deps --no-index /product/*.whl

# By number, so that an orchestrator sees that it is not root.
RUN install -d -o 10001 -g 10001 -m 0700 /run/mosel /var/lib/mosel /var/lib/mosel/profiles
USER 10001:10001
# Malloc: large temporaries of networks would go back to the kernel after each call and be faulted in again in the next.
ENV PATH=/opt/mosel/bin:$PATH \
    HOME=/tmp \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_TRIM_THRESHOLD_=1073741824 \
    MALLOC_MMAP_THRESHOLD_=1073741824 \
    MOSEL_RUN_DIR=/run/mosel/sockets \
    MOSEL_PROFILES_DIR=/var/lib/mosel/profiles
# Of the gateway; whoever starts another role says where to ask.
HEALTHCHECK --interval=5s --timeout=5s --start-period=2m CMD ["mosel", "health"]
CMD ["mosel", "up"]
