"""What the performance test plan says, as printed there."""

# Section 2, "Monitoring Metrics".
QUERIES = [
    "histogram_quantile(0.95, rate(order_processing_seconds_bucket[1m]))",
    "histogram_quantile(0.99, rate(order_processing_seconds_bucket[1m]))",
    "rate(order_processing_seconds_sum[1m]) / rate(order_processing_seconds_count[1m])",
    'sum(rate(orders_total{status="error"}[1m])) / sum(rate(orders_total[1m])) * 100',
    'sum(rate(orders_total{status="error"}[1m])) by (error_type)',
    "rate(process_cpu_seconds_total[1m])",
    "process_resident_memory_bytes",
    "rate(db_connections_total[1m])",
]

# Section 5, "Infrastructure Optimizations".
INFRASTRUCTURE = """
# Kubernetes resource limits
resources:
  limits:
    cpu: 2000m
    memory: 2Gi
  requests:
    cpu: 1000m
    memory: 1Gi

# Autoscaling configuration
autoscaling:
  enabled: true
  minReplicas: 3
  maxReplicas: 10
  targetCPUUtilizationPercentage: 70
"""
