# The updater. Model runtime: --build-arg EXTRA=cpu (the default) or gpu. No torch: the bundle comes from outside, to /bundle.
#
#   docker build -t notellm-updater:0.1.0-cpu .
ARG PYTHON=3.11.14

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRA=cpu
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/source/constraints.txt
WORKDIR /source
RUN case "${EXTRA}" in cpu|gpu) ;; *) echo "EXTRA: '${EXTRA}' is not allowed: cpu or gpu" >&2; exit 1 ;; esac \
    && python -m venv /opt/notellm
# What the project needs first: it changes less often than the project. constraints.txt has every version but click's,
# on which the extras that are not in here disagree.
COPY constraints.txt pyproject.toml ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*project['dependencies'], *project['optional-dependencies']['${EXTRA}'], sep='\n')" > requirements.txt \
    && /opt/notellm/bin/python -m pip install --only-binary :all: --requirement requirements.txt click==8.5.1 setuptools
COPY README.md LICENSE ./
COPY notellm notellm
COPY training training
COPY export export
COPY consumers consumers
COPY streams streams
COPY commands commands
RUN /opt/notellm/bin/python -m pip install --no-deps --no-build-isolation . \
    && /opt/notellm/bin/python -m pip uninstall --yes setuptools pip \
    && /opt/notellm/bin/notellm update --help > /dev/null

FROM python:${PYTHON}-slim-bookworm
ARG EXTRA=cpu
LABEL org.opencontainers.image.title="NoteLLM updater (${EXTRA})" \
      org.opencontainers.image.description="Notes from Kafka, embedded and tagged by one LLM, into Milvus" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# Without a home to write to: all that is written goes to /tmp.
RUN groupadd --system --gid 10001 notellm \
    && useradd --system --uid 10001 --gid notellm --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin notellm
COPY --from=build /opt/notellm /opt/notellm
# onnxruntime's packages report to their maker unless told not to. The last two are for gpu: what the container runtime
# lends, and where CUDA keeps what it compiles.
ENV PATH=/opt/notellm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NOTELLM_ENCODER_BUNDLE=/bundle \
    NOTELLM_OPERATIONS_PORT=9464 \
    ORT_DISABLE_TELEMETRY=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUDA_CACHE_PATH=/tmp/cuda
WORKDIR /tmp
USER 10001:10001
EXPOSE 9464
STOPSIGNAL SIGTERM
# Only what a restart would mend. The reasons are printed: docker inspect shows them.
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=4 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ['NOTELLM_OPERATIONS_PORT']), timeout=8); c.request('GET', '/healthz'); r = c.getresponse(); print(r.read().decode()); sys.exit(r.status != 200)"]
ENTRYPOINT ["notellm"]
CMD ["update"]
