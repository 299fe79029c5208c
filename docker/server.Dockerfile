# The aggregator. Build from the project's root:
#
#   docker build -f docker/server.Dockerfile -t fedward-server .
#   docker run --rm -v fedward:/state fedward-server init /state --name aggregator.example --fleet-port 9092
#   docker run -d --read-only --tmpfs /tmp -v fedward:/state -p 9092:9092 fedward-server
FROM python:3.12-slim AS build
# Where pip finds torch without CUDA, if not on the index it asks anyway.
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /build
RUN python -m venv /venv
COPY pyproject.toml README.md LICENSE ./
COPY shared ./shared
COPY server ./server
RUN /venv/bin/python -m pip install --no-cache-dir ".[server]"

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fedward \
    && install -d -o fedward -m 0700 /state
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
USER 10001:10001
WORKDIR /state
VOLUME /state
# Hospitals reach this one port. Control, runtime, health and metrics stay on the container's loopback.
EXPOSE 9092
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["fedward-server", "status", "/state", "--healthy"]
ENTRYPOINT ["fedward-server"]
CMD ["start", "/state"]
