# The Kubernetes manifests: settings in, { "path below k8s/" = text; } out. Every number and name of
# k8s/ stands here, once; `nix run .#generate` writes the files, and a check fails when they differ.
{ lib }:
let
  # The contract's name of everything, which the runbook's commands spell out.
  name = "anthropic-oauth-proxy";
  versions = import ./version.nix;
in
{
  # The proxy's image, and when kubelet asks a registry for it. Without a registry
  # (`nix run .#load`) it is on the node already.
  image ? "${name}:${versions.proxy}",
  imagePullPolicy ? "IfNotPresent",
  # The sidecar's image. Its default tag is the version of the tailscale.com module in go.mod.
  tailscaleImage ? "ghcr.io/tailscale/tailscale:${versions.tailscale}",
  # The node's name on the tailnet.
  hostname ? name,
  # How the node logs in; ./login.nix has the kinds.
  login ? { },
  # The Tailscale Service of the overlay one-name, svc:SERVICE: the name that clients use there.
  service ? hostname,
  # Where all objects live.
  namespace ? name,
  # The namespace whose pods may reach /metrics from inside the cluster: Prometheus' own.
  prometheusNamespace ? "monitoring",
  # The https URL where RUNBOOK.md can be read: the alerts then link to its sections.
  runbookUrl ? null,
  # error, warn, info, debug or trace.
  logLevel ? "info",
  # config.toml as attributes, laid over defaultConfig below.
  config ? { },
  # Requests and limits of the containers `proxy` and `tailscaled`, laid over defaultResources below.
  # GOMEMLIMIT follows each container's memory limit, GOMAXPROCS its CPU limit.
  resources ? { },
}:
let
  # More of the contract's names.
  configDir = "/etc/${name}";
  socketDir = "/var/run/tailscale";
  socket = "${socketDir}/tailscaled.sock";
  stateDir = "/var/lib/tailscale";

  # Every key that the file may hold, so that whoever edits the ConfigMap finds it there. All but
  # body_memory_mb, health_addr and require_tailnet are the program's own defaults.
  defaultConfig = {
    tailscale = {
      inherit hostname socket;
      capability = "";
    };
    proxy = {
      listen_addr = "0.0.0.0:8080";
      upstream_url = "https://api.anthropic.com";
      timeout_secs = 60;
      timeout_retries = 2;
      honor_client_timeout = true;
      connect_timeout_secs = 5;
      proxy_protocol_addr = "";
      # A pod that is busy on the other port is still alive: probes and scrapes come here.
      health_addr = "0.0.0.0:8081";
      max_connections = 1000;
      max_body_mb = 10;
      # Of 128Mi. A connection of a client takes 38 KiB of GOMEMLIMIT beside this, and the program accepts as many
      # as that leaves: 1077, enough for max_connections.
      body_memory_mb = 24;
      drain_timeout_secs = 5;
      # Loopback is no trust boundary in a pod, nor is the cluster's network: only callers that
      # tailscaled knows are served.
      require_tailnet = true;
    };
    headers = [
      {
        name = "anthropic-beta";
        value = "oauth-2025-04-20";
      }
    ];
  };
  settings = lib.recursiveUpdate defaultConfig config;
  # With a Tailscale Service. Not 127.0.0.1, to which tailscaled hands on what peers send to the node.
  serviceSettings = lib.recursiveUpdate (lib.recursiveUpdate defaultConfig {
    proxy.proxy_protocol_addr = "127.0.0.2:8082";
  }) config;
  # The ports, and which of them has probes and scrapes.
  ports = {
    http = portOf settings.proxy.listen_addr;
  }
  // lib.optionalAttrs (settings.proxy.health_addr != "") {
    health = portOf settings.proxy.health_addr;
  };
  healthPort = if ports ? health then "health" else "http";

  defaultResources = {
    proxy = {
      requests = {
        cpu = "50m";
        memory = "32Mi";
      };
      limits = {
        cpu = "500m";
        memory = "128Mi";
      };
    };
    tailscaled = {
      requests = {
        cpu = "50m";
        memory = "64Mi";
      };
      limits = {
        cpu = "250m";
        memory = "256Mi";
      };
    };
  };
  sizes = lib.recursiveUpdate defaultResources resources;

  # What Go gets of the memory limit, in percent. The kernel counts more against the limit than Go knows of:
  # the sockets' buffers (24 KiB of each upload that waits), the resident pages of the binary and the
  # tmpfs of the socket. A heap that reaches GOMEMLIMIT costs CPU for garbage collection; a container that reaches its
  # limit is killed: tailscaled, which buffers what it forwards, within seconds of large uploads.
  goShare = {
    proxy = 75;
    tailscaled = 80;
  };
  goMemoryLimitMi = container: mebibytes sizes.${container}.limits.memory * goShare.${container} / 100;
  goMemoryLimit = container: "${toString (goMemoryLimitMi container)}MiB";
  proxyMemoryLimit =
    if settings.proxy.body_memory_mb < goMemoryLimitMi "proxy" then
      goMemoryLimit "proxy"
    else
      throw "body_memory_mb = ${toString settings.proxy.body_memory_mb} does not fit the proxy's memory limit: GOMEMLIMIT is ${goMemoryLimit "proxy"}";

  # Threads that run Go code at once: whole CPUs of the limit, at least one. By itself Go takes no fewer
  # than two; with half a CPU they use up a period's share in half the time, and then all wait.
  goMaxProcs = container: toString (lib.max 1 (wholeCPUs sizes.${container}.limits.cpu));

  # kubelet stops the proxy first, which drains for at most so long, and then the sidecar, which
  # logs its node out of the tailnet (tailscaled gives that 5 s) and exits. After heavy load its SIGTERM
  # was seen to come 9 s late; a sidecar that is killed before it logs out leaves its name behind.
  sidecarStopSecs = 25;
  gracePeriodSecs = settings.proxy.drain_timeout_secs + sidecarStopSecs;

  # A proxy that finds no tailnet exits by itself, after 31 s (1 + 2 + 4 + 8 + 16), and says why. The
  # startup probe must never be the one to end it, or nobody would learn the reason; and kubelet goes on
  # counting its failures when the container restarts. So it gets a day.
  startupFailures = 86400;

  # Two uids, so that only the sidecar may change the tailscale daemon's settings: to others than
  # root and its own uid, tailscaled's socket is read-only.
  proxyUid = 65532;
  tailscaledUid = 65533;

  selector = {
    "app.kubernetes.io/name" = name;
    "app.kubernetes.io/component" = "proxy";
  };
  # Selectors can't be changed once they are installed; labels can.
  labels = selector // {
    "app.kubernetes.io/instance" = name;
    "app.kubernetes.io/managed-by" = "kustomize";
    "app.kubernetes.io/part-of" = name;
    "app.kubernetes.io/version" = versions.proxy;
  };
  metadata = {
    inherit name namespace labels;
  };

  namespaceObject = {
    apiVersion = "v1";
    kind = "Namespace";
    metadata = {
      name = namespace;
      labels =
        labels
        // lib.genAttrs [
          "pod-security.kubernetes.io/audit"
          "pod-security.kubernetes.io/enforce"
          "pod-security.kubernetes.io/warn"
        ] (_: "restricted");
    };
  };

  serviceAccount = {
    apiVersion = "v1";
    kind = "ServiceAccount";
    inherit metadata;
    automountServiceAccountToken = false;
  };

  configMap = settings: {
    apiVersion = "v1";
    kind = "ConfigMap";
    inherit metadata;
    data."config.toml" = (import ./toml.nix).render settings;
  };

  identity = import ./login.nix { inherit lib; } login;

  deployment = {
    apiVersion = "apps/v1";
    kind = "Deployment";
    inherit metadata;
    spec = {
      # Two pods with one hostname are two nodes, of which the second is renamed: so one pod at a
      # time, also while a new one replaces it.
      replicas = 1;
      strategy.type = "Recreate";
      selector.matchLabels = selector;
      template = {
        metadata = { inherit labels; };
        spec = pod;
      };
    };
  };

  pod = {
    serviceAccountName = name;
    automountServiceAccountToken = false;
    enableServiceLinks = false;
    # Kubernetes would have each dial ask for the API's name under every search domain first (ndots: 5). And Go waits
    # 5 s for an answer that got lost, which is all that connect_timeout_secs grants.
    dnsConfig.options = nameValues {
      ndots = "1";
      timeout = "2";
      attempts = "3";
    };
    terminationGracePeriodSeconds = gracePeriodSecs;
    securityContext = {
      runAsNonRoot = true;
      seccompProfile.type = "RuntimeDefault";
    };
    initContainers = [ tailscaled ];
    containers = [ proxy ];
    volumes = [
      {
        name = "config";
        configMap.name = name;
      }
      {
        name = "tailscale-socket";
        emptyDir = {
          medium = "Memory";
          sizeLimit = "1Mi";
        };
      }
      {
        # tailscaled buffers its own logs here, in two files of up to 50 MB.
        name = "tailscale-state";
        emptyDir.sizeLimit = "128Mi";
      }
    ]
    ++ identity.volumes;
  };

  restricted = uid: {
    runAsUser = uid;
    runAsGroup = uid;
    allowPrivilegeEscalation = false;
    readOnlyRootFilesystem = true;
    capabilities.drop = [ "ALL" ];
  };

  proxy = {
    name = "proxy";
    inherit image imagePullPolicy;
    env = nameValues {
      LOG_LEVEL = logLevel;
      GOMEMLIMIT = proxyMemoryLimit;
      GOMAXPROCS = goMaxProcs "proxy";
    };
    ports = lib.mapAttrsToList (name: containerPort: { inherit name containerPort; }) ports;
    # Once a second while starting, since nothing serves before it passes.
    startupProbe = httpGet "/health" // {
      periodSeconds = 1;
      failureThreshold = startupFailures;
    };
    readinessProbe = httpGet "/health" // {
      periodSeconds = 5;
      timeoutSeconds = 2;
      failureThreshold = 2;
    };
    # Not /health: a restart of the proxy mends no tailnet.
    livenessProbe = httpGet "/livez" // {
      periodSeconds = 10;
      timeoutSeconds = 5;
      failureThreshold = 3;
    };
    resources = sizes.proxy;
    securityContext = restricted proxyUid;
    volumeMounts = [
      {
        name = "config";
        mountPath = configDir;
        readOnly = true;
      }
      {
        name = "tailscale-socket";
        mountPath = socketDir;
        readOnly = true;
      }
    ];
  };

  # A native sidecar: it starts before the proxy, and outlives it, so that requests in flight drain
  # over the tailnet. It has no startup probe: with a bad auth key the daemon lives for a fraction
  # of a second, such a probe would never pass, and the proxy would never start to name the error.
  #
  # The node key stays in the daemon's memory (--state=mem:). Its node is then ephemeral whatever the
  # auth key says, and the daemon logs it out when it is stopped: a rollout, a drained node and a
  # rotated auth key free the hostname before the next pod asks for it. A key kept in an emptyDir
  # would leave the old node behind with every pod, and the next one would be called
  # ${hostname}-1; a key kept in a Secret needs an API token and a Role for this container.
  # The price: the auth key has to be reusable, and a daemon that is killed leaves its node behind
  # until the tailnet removes it as any ephemeral node.
  tailscaled = {
    name = "tailscaled";
    image = tailscaleImage;
    restartPolicy = "Always";
    env =
      identity.env
      ++ nameValues {
        TS_HOSTNAME = hostname;
        TS_SOCKET = socket;
        # Below the mount: the daemon sets the mode of its directory, and the mount's root is not its
        # own. Only logs and certificates go there.
        TS_STATE_DIR = "${stateDir}/state";
        TS_TAILSCALED_EXTRA_ARGS = "--state=mem:";
        # Unset, this would mean a Secret named tailscale.
        TS_KUBE_SECRET = "";
        TS_AUTH_ONCE = "true";
        # The pod resolves names as the cluster does.
        TS_ACCEPT_DNS = "false";
        # No NET_ADMIN, no tun device.
        TS_USERSPACE = "true";
        # The daemon acknowledges what comes for a client that has vanished, and would notice after four minutes. So, within one.
        TS_NETSTACK_KEEPALIVE_IDLE = "15s";
        TS_NETSTACK_KEEPALIVE_INTERVAL = "5s";
        GOMEMLIMIT = goMemoryLimit "tailscaled";
        GOMAXPROCS = goMaxProcs "tailscaled";
      };
    resources = sizes.tailscaled;
    securityContext = restricted tailscaledUid;
    volumeMounts = [
      {
        name = "tailscale-socket";
        mountPath = socketDir;
      }
      {
        name = "tailscale-state";
        mountPath = stateDir;
      }
    ]
    ++ identity.volumeMounts;
  };

  # Tailnet traffic comes in through the sidecar's own outgoing connections, and kubelet's probes are
  # always let in, so only Prometheus needs a way in.
  networkPolicy = {
    apiVersion = "networking.k8s.io/v1";
    kind = "NetworkPolicy";
    inherit metadata;
    spec = {
      podSelector.matchLabels = selector;
      policyTypes = [
        "Ingress"
        "Egress"
      ];
      ingress = [
        {
          from = [
            { namespaceSelector.matchLabels."kubernetes.io/metadata.name" = prometheusNamespace; }
          ];
          ports = [
            {
              protocol = "TCP";
              port = healthPort;
            }
          ];
        }
      ];
      egress = [
        {
          # The upstream, the control server, DERP relays; port 80 for captive portals and upgrades;
          # 53 for answers that do not fit a datagram.
          ports = map (port: {
            protocol = "TCP";
            inherit port;
          }) [
            443
            80
            53
          ];
        }
        # DNS, STUN and WireGuard, whose peers use any port.
        { ports = [ { protocol = "UDP"; } ]; }
      ];
    };
  };

  # What the other files need to know of everything.
  names = {
    inherit
      lib
      name
      namespace
      labels
      selector
      ;
  };

  oneName = import ./one-name.nix (
    names
    // {
      inherit
        pod
        proxy
        tailscaled
        tailscaledUid
        service
        socket
        ;
      port = ports.http;
      healthPort = ports.${healthPort};
      proxyProtocolAddr = serviceSettings.proxy.proxy_protocol_addr;
    }
  );

  monitoring = import ./monitoring.nix (
    names
    // {
      inherit runbookUrl healthPort;
      memoryLimitMi = mebibytes sizes.proxy.limits.memory;
    }
  );

  httpGet = path: {
    httpGet = {
      inherit path;
      port = healthPort;
    };
  };

  # An empty value is left out, which means the same: the API server drops it, and `kubectl apply` would
  # forever find a difference.
  nameValues = lib.mapAttrsToList (
    name: value: { inherit name; } // lib.optionalAttrs (value != "") { inherit value; }
  );

  portOf =
    address:
    let
      parts = builtins.match ".*:([0-9]+)" address;
    in
    if parts == null then
      throw "${address}: no port in it"
    else
      lib.toInt (builtins.head parts);

  # A quantity of memory such as 128Mi or 1Gi, in MiB.
  mebibytes =
    quantity:
    let
      parts = builtins.match "([0-9]+)(Mi|Gi)" quantity;
      number = lib.toInt (builtins.head parts);
    in
    if parts == null then
      throw "memory limit ${quantity}: give it in Mi or Gi"
    else if lib.last parts == "Gi" then
      number * 1024
    else
      number;

  # A quantity of CPUs such as 500m, 2 or "1.5", rounded up.
  wholeCPUs =
    quantity:
    let
      parts = builtins.match "([0-9]+)(m|[.][0-9]+)?" (toString quantity);
      number = lib.toInt (builtins.head parts);
      unit = lib.last parts;
    in
    if parts == null then
      throw "CPU limit ${toString quantity}: give it like 500m, 2 or 1.5"
    else if unit == "m" then
      (number + 999) / 1000
    else if unit == null || builtins.match "[.]0+" unit != null then
      number
    else
      number + 1;

  # A file: what to know about it, then its object.
  file =
    about: object:
    lib.concatMapStrings (line: "# ${line}\n") (
      [ "Generated by `nix run .#generate` from nix/manifests.nix." ] ++ about
    )
    + (import ./yaml.nix).render object;

  # A directory for `kubectl apply -k`: its files, and a kustomization.yaml that names them all.
  directory =
    prefix: kustomization: files:
    lib.mapAttrs' (path: lib.nameValuePair (prefix + path)) (
      files
      // {
        "kustomization.yaml" = file [ ] (
          {
            apiVersion = "kustomize.config.k8s.io/v1beta1";
            kind = "Kustomization";
            resources = lib.attrNames files;
          }
          // kustomization
        );
      }
    );

  # What a pod needs, whoever makes it. An overlay in k8s/ can't refer to k8s/ itself: kustomize calls
  # that a cycle. The folder and the workload are for those who edit there.
  common = folder: workload: settings: {
    "namespace.yaml" = file [ ] namespaceObject;
    "serviceaccount.yaml" = file [ "The pod never talks to the API server: no token is mounted." ] serviceAccount;
    "configmap.yaml" = file [
      "README.md explains the keys. After an edit here: kubectl apply -k ${folder}, then"
      "kubectl -n ${namespace} rollout restart ${workload}."
      "drain_timeout_secs and the ports are also in the pod: change those in nix/manifests.nix."
    ] (configMap settings);
    "networkpolicy.yaml" = file [
      "In: Prometheus, from the namespace ${prometheusNamespace}. Out: DNS, HTTPS, HTTP, and UDP for WireGuard."
    ] networkPolicy;
  };
in
directory "" { } (
  common "k8s/" "deployment/${name}" settings
  // {
    "deployment.yaml" = file [
      identity.secretIs
      "nix/manifests.nix says why each value is what it is."
    ] deployment;
  }
)
// directory "components/monitoring/" monitoring.kustomization {
  "podmonitor.yaml" = file [ ] monitoring.podMonitor;
  "prometheusrule.yaml" = file [ ] monitoring.prometheusRule;
  "dashboard.json" = monitoring.dashboard;
}
// directory "overlays/one-name/" { } (
  common "k8s/overlays/one-name/" "statefulset/${oneName.statefulSet.metadata.name}" serviceSettings
  // {
    "poddisruptionbudget.yaml" = file [ ] oneName.disruptionBudget;
    "service.yaml" = file [ ] oneName.headlessService;
    "statefulset.yaml" = file [
      identity.secretIs
      "nix/one-name.nix says why each value is what it is."
    ] oneName.statefulSet;
  }
)
