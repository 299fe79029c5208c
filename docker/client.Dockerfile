# A hospital's daemon: the code of client and shared and nothing else. It opens connections and accepts none.
# Build from the project's root:
#
#   docker build -f docker/client.Dockerfile -t fedward-site .
#   docker run --rm -v site:/state -v /pacs/export:/data:ro fedward-site intake /state /data --annotations annotations.csv
#   docker run -d --read-only --tmpfs /tmp -v site:/state fedward-site
FROM python:3.12-slim AS build
# Where pip finds torch for this machine's CPU or GPU, if not on the index it asks anyway.
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /build
RUN python -m venv /venv
COPY pyproject.toml README.md LICENSE ./
COPY shared ./shared
COPY client ./client
RUN /venv/bin/python -m pip install --no-cache-dir .

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin fedward \
    && install -d -o fedward -m 0700 /state
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
USER 10001:10001
WORKDIR /state
VOLUME /state
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s CMD ["fedward-site", "status", "/state", "--healthy"]
ENTRYPOINT ["fedward-site"]
CMD ["start", "/state"]
