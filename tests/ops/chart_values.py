"""Values for the chart's tests: everything switched on."""

from typing import Any

MAXIMAL: dict[str, Any] = {
    "image": {"digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "registry"}],
    "commonLabels": {"team": "storage"},
    "remote": {
        "url": "s3://checkpoints/production",
        "endpointUrl": "https://s3.example.com",
        "region": "eu-central-1",
        "credentialsSecret": "bop-s3",
    },
    "settings": {"BOP_SHUTDOWN_SECONDS": "40", "BOP_QUOTA_GLOBAL_BYTES": "80000000000"},
    "extraEnv": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
    "service": {"type": "LoadBalancer", "annotations": {"example.com/kind": "internal"}},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "0"},
        "tls": {"enabled": True},
    },
    "persistence": {"storageClassName": "fast", "annotations": {"example.com/backup": "no"}},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/bop"}},
    "podAnnotations": {"example.com/note": "x"},
    "podLabels": {"zone": "a"},
    "nodeSelector": {"disk": "ssd"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {
            "maxSkew": 1,
            "topologyKey": "topology.kubernetes.io/zone",
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": {"app.kubernetes.io/name": "bop-checkpoint"}},
        }
    ],
    "priorityClassName": "system-cluster-critical",
    "networkPolicy": {
        "from": [{"namespaceSelector": {"matchLabels": {"name": "apps"}}}],
        "adminFrom": [{"namespaceSelector": {"matchLabels": {"name": "operators"}}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}],
        "egressPorts": [443, 8333],
    },
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True},
    },
}
