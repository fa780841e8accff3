# MinIO from its source: since October 2025 its makers publish no images, and since September 2026 Docker Hub has
# none of it any more.

FROM golang:1.25.4-bookworm AS build
ENV CGO_ENABLED=0
RUN go install -trimpath -ldflags="-s -w" github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c

FROM debian:12.12-slim
COPY --from=build /go/bin/minio /usr/local/bin/minio
RUN useradd --uid 10001 --user-group --no-create-home minio \
    && install --directory --owner minio --group minio /data
USER 10001:10001
ENTRYPOINT ["minio"]
CMD ["server", "/data"]
