# The kustomize component k8s/components/monitoring: the texts of its files, by name. It is no part of
# k8s/ itself, since its objects need the Prometheus operator, and an apply fails on a kind that the
# cluster does not know.
{
  lib,
  # What ./manifests.nix calls its objects, where they live, and which labels choose the pods.
  name,
  namespace,
  labels,
  selector,
  # The proxy's memory limit, a line in the dashboard.
  memoryLimitMi,
  # Where RUNBOOK.md can be read; null if nowhere.
  runbookUrl,
  # The name of the port with /metrics.
  healthPort,
}:
let
  metadata = {
    inherit name namespace labels;
  };

  podMonitor = {
    apiVersion = "monitoring.coreos.com/v1";
    kind = "PodMonitor";
    inherit metadata;
    spec = {
      # The label job of every series is the pod's app.kubernetes.io/name.
      jobLabel = "app.kubernetes.io/name";
      selector.matchLabels = selector;
      podMetricsEndpoints = [
        {
          port = healthPort;
          path = "/metrics";
          interval = "15s";
          # A 503 of /health is no reason: while the tailnet is away, /metrics tells.
          filterRunning = true;
        }
      ];
    };
  };

  # Other jobs and namespaces have series of the same names.
  own = ''job="${name}",namespace="${namespace}"'';

  alert =
    {
      alert,
      expr,
      after,
      severity,
      summary,
      description,
      section,
    }:
    {
      inherit alert expr;
      "for" = after;
      labels = { inherit severity; };
      annotations = {
        inherit summary description;
      }
      // lib.optionalAttrs (runbookUrl != null) {
        runbook_url =
          if builtins.match "https?://.+" runbookUrl != null then
            "${runbookUrl}#${section}"
          else
            throw "runbookUrl = ${runbookUrl}: not absolute, so nobody could follow it from an alert";
      };
    };

  # The quantiles of the last five minutes, over all statuses of a pod: the histogram has a series
  # for each status, whose buckets have to be added first.
  buckets = metric: "sum by (namespace, job, pod, le) (rate(${metric}_bucket{${own}}[5m]))";
  quantile = q: metric: "histogram_quantile(${q}, ${buckets metric})";
  duration = "proxy_request_duration_seconds";

  # The share of a pod's answers in the last five minutes whose status is one of these.
  share =
    statuses:
    let
      perPod = selector: "sum by (namespace, job, pod) (rate(proxy_requests_total{${selector}}[5m]))";
    in
    "${perPod "${own},${statuses}"} / ${perPod own}";

  recorded =
    map
      (q: {
        record = "pod:${duration}:${q.name}_rate5m";
        expr = quantile q.value duration;
      })
      [
        {
          name = "p50";
          value = "0.5";
        }
        {
          name = "p90";
          value = "0.9";
        }
        {
          name = "p99";
          value = "0.99";
        }
        {
          name = "p999";
          value = "0.999";
        }
      ];

  alerts = map alert [
    {
      alert = "AnthropicProxyTailnetDisconnected";
      expr = "tailnet_connected{${own}} == 0";
      after = "60s";
      severity = "critical";
      summary = "The proxy has no tailnet connection.";
      description = "{{ $labels.pod }} has been without its tailnet for a minute: no client reaches it.";
      section = "it-ran-and-tailnet_connected-is-0";
    }
    {
      alert = "AnthropicProxyUpstreamErrors";
      expr = "rate(proxy_upstream_errors_total{${own}}[5m]) > 0.1";
      after = "5m";
      severity = "warning";
      summary = "Requests fail at the upstream.";
      description = "{{ $labels.pod }} fails {{ $value | humanize }} requests per second, for the reason {{ $labels.error_type }}.";
      section = "502-bad-gateway";
    }
    {
      alert = "AnthropicProxySlow";
      expr = "${quantile "0.99" duration} > 30";
      after = "5m";
      severity = "warning";
      summary = "One request in a hundred takes more than 30 s.";
      description = "The slowest hundredth of {{ $labels.pod }}'s requests takes {{ $value | humanizeDuration }} or longer. Calls to large models may well do: set the limit to what your clients do.";
      section = "it-is-slow";
    }
    {
      alert = "AnthropicProxyKeyExpires";
      expr = "tailnet_key_expiry_timestamp_seconds{${own}} - time() < 7 * 86400";
      after = "1h";
      severity = "warning";
      summary = "The node key expires within a week.";
      description = "{{ $labels.pod }}'s node key ends in {{ $value | humanizeDuration }}; a restart with a valid auth key gets a new one.";
      section = "rotate-the-auth-key";
    }
    {
      alert = "AnthropicProxyQueue";
      expr = "proxy_requests_queued{${own}} > 0";
      after = "5m";
      severity = "warning";
      summary = "Requests wait in line.";
      description = "{{ $value }} requests wait in {{ $labels.pod }}: max_connections or body_memory_mb is used up.";
      section = "it-is-slow";
    }
    {
      alert = "AnthropicProxyConnections";
      expr = "proxy_connections{${own}} > 0.9 * proxy_connections_limit{${own}}";
      after = "5m";
      severity = "warning";
      summary = "Nearly as many client connections as the memory limit carries.";
      description = "{{ $labels.pod }} has {{ $value }} client connections. Beyond the limit idle ones are closed, and then clients wait.";
      section = "it-is-slow";
    }
    {
      alert = "AnthropicProxyMemory";
      expr = "process_resident_memory_bytes{${own}} > ${toString (memoryLimitMi * 1024 * 1024 * 85 / 100)}";
      after = "5m";
      severity = "warning";
      summary = "The proxy is near its memory limit.";
      description = "{{ $labels.pod }} holds {{ $value | humanize1024 }}B of ${toString memoryLimitMi} MiB, to which its sockets' buffers come.";
      section = "out-of-memory";
    }
    {
      alert = "AnthropicProxyThrottled";
      expr = "${share ''status="429"''} > 0.05";
      after = "5m";
      severity = "warning";
      summary = "The API limits the rate of those who use the proxy.";
      description = "{{ $value | humanizePercentage }} of {{ $labels.pod }}'s answers are 429.";
      section = "429-and-529";
    }
    {
      alert = "AnthropicProxyOverloaded";
      expr = "${share ''status="529"''} > 0.05";
      after = "5m";
      severity = "warning";
      summary = "The API is overloaded.";
      description = "{{ $value | humanizePercentage }} of {{ $labels.pod }}'s answers are 529.";
      section = "429-and-529";
    }
    {
      alert = "AnthropicProxyServerErrors";
      expr = "${share ''status=~"5..",status!="529"''} > 0.05";
      after = "5m";
      severity = "warning";
      summary = "Clients see server errors.";
      description = "{{ $value | humanizePercentage }} of {{ $labels.pod }}'s answers are 5xx, 529 aside: the API's own, or the proxy's.";
      section = "502-bad-gateway";
    }
    {
      alert = "AnthropicProxyLogLinesDropped";
      expr = "increase(proxy_log_lines_dropped_total{${own}}[10m]) > 0";
      after = "1m";
      severity = "warning";
      summary = "Log lines are lost.";
      description = "{{ $labels.pod }} gave up {{ $value | humanize }} log lines in ten minutes: nobody reads its standard output in time.";
      section = "logs";
    }
    {
      alert = "AnthropicProxyScrapeMissing";
      expr = "up{${own}} == 0 or absent(up{${own}})";
      after = "5m";
      severity = "critical";
      summary = "Prometheus gets no figures from the proxy.";
      description = "No pod of ${name} is there, or its /metrics does not answer: none of the other alerts can fire.";
      section = "the-pod-is-in-crashloopbackoff";
    }
  ];

  prometheusRule = {
    apiVersion = "monitoring.coreos.com/v1";
    kind = "PrometheusRule";
    inherit metadata;
    spec.groups = [
      {
        name = "${name}.records";
        rules = recorded;
      }
      {
        name = "${name}.alerts";
        rules = alerts;
      }
    ];
  };

  # A panel of the dashboard: lines over time. Panels are half the dashboard wide and are laid out in
  # their order.
  panels = [
    {
      title = "Requests by status";
      description = "Answers a second, as clients see them. 499 is a client that left, 429 and 529 are the API's.";
      unit = "reqps";
      lines."{{status}}" = "sum by (status) (rate(proxy_requests_total{$pods}[$__rate_interval]))";
    }
    {
      title = "Duration of requests";
      description = "From arrival to the end of the answer, estimated from the histogram. Streams take as long as they take.";
      unit = "s";
      lines = quantileLines duration;
    }
    {
      title = "Time to first byte";
      description = "From arrival to the API's response headers.";
      unit = "s";
      lines = quantileLines "proxy_time_to_first_byte_seconds";
    }
    {
      title = "In flight and queued";
      description = "Queued requests wait for max_connections or for body_memory_mb.";
      unit = "short";
      lines = {
        "in flight" = "sum(proxy_requests_in_flight{$pods})";
        queued = "sum(proxy_requests_queued{$pods})";
      };
    }
    {
      title = "Client connections";
      description = "Beyond the limit, which follows the memory limit, idle ones are closed, and then clients wait.";
      unit = "short";
      lines = {
        "open {{pod}}" = "proxy_connections{$pods}";
        limit = "max(proxy_connections_limit{$pods})";
      };
    }
    {
      title = "Errors by type";
      description = "Requests that failed between the proxy and the API, as RUNBOOK.md names them.";
      unit = "reqps";
      lines."{{error_type}}" =
        "sum by (error_type) (rate(proxy_upstream_errors_total{$pods}[$__rate_interval]))";
    }
    {
      title = "Repeated attempts";
      description = "After timeouts, and after connection failures where nothing was sent.";
      unit = "reqps";
      lines.repeated = "sum(rate(proxy_upstream_retries_total{$pods}[$__rate_interval]))";
    }
    {
      title = "Plan windows";
      description = "What the API says of its callers' windows of 5 hours and 7 days, by answer.";
      unit = "reqps";
      lines."{{status}}" =
        "sum by (status) (rate(proxy_upstream_ratelimit_status_total{$pods}[$__rate_interval]))";
    }
    {
      title = "Tailnet";
      description = "1 is connected. Without the control server traffic flows on.";
      unit = "short";
      lines = {
        "connected {{pod}}" = "tailnet_connected{$pods}";
        "control server {{pod}}" = "tailnet_control_online{$pods}";
      };
    }
    {
      title = "Memory of the proxy";
      description = "To what is resident come the sockets' buffers: a quarter of the limit is left to them.";
      unit = "bytes";
      lines = {
        "request bodies {{pod}}" = "proxy_buffered_body_bytes{$pods}";
        "resident {{pod}}" = "process_resident_memory_bytes{$pods}";
        GOMEMLIMIT = "max(go_gc_gomemlimit_bytes{$pods})";
        limit = "vector(${toString (memoryLimitMi * 1024 * 1024)})";
      };
    }
    {
      title = "Log lines dropped";
      description = "Nobody read standard output in time.";
      unit = "short";
      lines."{{pod}}" = "increase(proxy_log_lines_dropped_total{$pods}[$__rate_interval])";
    }
  ];
  quantileLines =
    metric:
    lib.genAttrs [ "0.5" "0.9" "0.99" "0.999" ] (
      q: "histogram_quantile(${q}, sum by (le) (rate(${metric}_bucket{$pods}[$__rate_interval])))"
    );

  dashboard = {
    title = "Anthropic OAuth proxy";
    uid = name;
    tags = [ name ];
    schemaVersion = 39;
    editable = false;
    refresh = "30s";
    time = {
      from = "now-3h";
      to = "now";
    };
    templating.list = [
      {
        name = "datasource";
        type = "datasource";
        query = "prometheus";
        label = "Data source";
      }
      {
        name = "namespace";
        type = "query";
        label = "Namespace";
        datasource = source;
        query = ''label_values(proxy_build_info{job="${name}"}, namespace)'';
        refresh = 2;
        includeAll = true;
        multi = true;
        current = {
          text = "All";
          value = "$__all";
        };
      }
    ];
    panels = lib.imap0 panel panels;
  };
  source = {
    type = "prometheus";
    uid = "\${datasource}";
  };
  pods = ''job="${name}",namespace=~"$namespace"'';
  panel =
    i:
    {
      title,
      description,
      unit,
      lines,
    }:
    {
      id = i + 1;
      type = "timeseries";
      inherit title description;
      datasource = source;
      gridPos = {
        h = 8;
        w = 12;
        x = 12 * (i - i / 2 * 2);
        y = i / 2 * 8;
      };
      fieldConfig = {
        defaults = {
          inherit unit;
          min = 0;
        };
        overrides = [ ];
      };
      targets = lib.imap0 (j: legend: {
        refId = builtins.substring j 1 "ABCDEFGH";
        expr = builtins.replaceStrings [ "$pods" ] [ pods ] lines.${legend};
        legendFormat = legend;
      }) (lib.attrNames lines);
    };

  # JSON with one member a line, for readers of diffs.
  pretty =
    indent: value:
    let
      inner = indent + "  ";
      block =
        open: close: members:
        "${open}\n${inner}${lib.concatStringsSep ",\n${inner}" members}\n${indent}${close}";
    in
    if lib.isAttrs value && value != { } then
      block "{" "}" (lib.mapAttrsToList (k: v: "${builtins.toJSON k}: ${pretty inner v}") value)
    else if lib.isList value && value != [ ] then
      block "[" "]" (map (pretty inner) value)
    else
      builtins.toJSON value;
in
{
  inherit podMonitor prometheusRule;
  dashboard = pretty "" dashboard + "\n";

  kustomization = {
    apiVersion = "kustomize.config.k8s.io/v1alpha1";
    kind = "Component";
    resources = [
      "podmonitor.yaml"
      "prometheusrule.yaml"
    ];
    configMapGenerator = [
      {
        name = "${name}-dashboard";
        inherit namespace;
        files = [ "dashboard.json" ];
        options = {
          # Grafana's sidecar looks for this label.
          labels = labels // {
            grafana_dashboard = "1";
          };
          disableNameSuffixHash = true;
        };
      }
    ];
  };
}
