# The objects of k8s/overlays/one-name that take the Deployment's place: several pods, each a tailnet node of its own, behind one
# name, that of a Tailscale Service. docs/kubernetes.md says what the tailnet needs for it.
{
  lib,
  # What ./manifests.nix calls its objects, where they live, and which labels choose the pods.
  name,
  namespace,
  labels,
  selector,
  # The Deployment's pod, with its two containers.
  pod,
  proxy,
  tailscaled,
  # The group that may write to the volume tailscale-state.
  tailscaledUid,
  # The Tailscale Service, without svc:.
  service,
  # The ports of the pod for clients, and for /health.
  port,
  healthPort,
  # What proxy.proxy_protocol_addr is.
  proxyProtocolAddr,
  # tailscaled's socket.
  socket,
}:
let
  # Pods, and so nodes, are called ${replica}-0, ${replica}-1 and so on.
  replica = "${name}-replica";
  metadata = {
    inherit namespace labels;
    name = replica;
  };

  # How long the control server may take to have clients go to another host, or to take one into account that has come: 15 s are
  # named in tailscale's own code.
  settleSecs = 20;

  tailscale = [
    "tailscale"
    "--socket=${socket}"
  ];

  sidecar = tailscaled // {
    # Nothing in containerboot makes the node a host of the service after each of its starts: TS_SERVE_CONFIG does not at the first
    # one (tailscale/tailscale#19693), and what it withdraws when it stops is withdrawn in the state that is kept (#17769, #18527). So
    # this does, once the proxy is on the tailnet, beside containerboot: a postStart hook would keep the proxy from starting.
    command = [
      "/bin/sh"
      "-c"
      ''
        until
          wget -q -O /dev/null http://127.0.0.1:${toString healthPort}/health 2>/dev/null &&
          ${toString tailscale} serve --service=svc:${service} --tcp=${toString port} --proxy-protocol=1 tcp://${proxyProtocolAddr}
        do
          sleep 1
        done &
        exec containerboot
      ''
    ];
    env =
      # A node that comes back must be the same node: the key is kept on the pod's own volume, and so the
      # auth key is used once per pod.
      lib.filter (entry: entry.name != "TS_HOSTNAME" && entry.name != "TS_TAILSCALED_EXTRA_ARGS") tailscaled.env
      ++ [
        {
          name = "TS_HOSTNAME";
          valueFrom.fieldRef.fieldPath = "metadata.name";
        }
        {
          # Or it takes the service back while that is drained.
          name = "TS_EXPERIMENTAL_SERVICE_AUTO_ADVERTISEMENT";
          value = "false";
        }
      ];
    # When the pod is told to end: no new clients.
    lifecycle.preStop.exec.command = tailscale ++ [
      "serve"
      "drain"
      "svc:${service}"
    ];
  };

  statefulSet = {
    apiVersion = "apps/v1";
    kind = "StatefulSet";
    inherit metadata;
    spec = {
      replicas = 2;
      serviceName = replica;
      # The pods do not wait for each other, but an update replaces one at a time.
      podManagementPolicy = "Parallel";
      minReadySeconds = settleSecs;
      selector.matchLabels = selector;
      template = {
        metadata = { inherit labels; };
        spec = pod // {
          terminationGracePeriodSeconds = settleSecs + pod.terminationGracePeriodSeconds;
          initContainers = [ sidecar ];
          containers = [
            # Clients come until they have another host. Kubernetes 1.30 and later can sleep.
            (proxy // { lifecycle.preStop.sleep.seconds = settleSecs; })
          ];
          volumes = lib.filter (volume: volume.name != "tailscale-state") pod.volumes;
          # A new volume belongs to root, and the sidecar does not run as root.
          securityContext = pod.securityContext // {
            fsGroup = tailscaledUid;
          };
          # Pods on different machines, as far as there are any.
          topologySpreadConstraints = [
            {
              maxSkew = 1;
              topologyKey = "kubernetes.io/hostname";
              whenUnsatisfiable = "ScheduleAnyway";
              labelSelector.matchLabels = selector;
            }
          ];
        };
      };
      volumeClaimTemplates = [
        {
          metadata.name = "tailscale-state";
          spec = {
            accessModes = [ "ReadWriteOnce" ];
            resources.requests.storage = "256Mi";
          };
        }
      ];
    };
  };

  # A StatefulSet wants one for its pods' names in the cluster. Clients come over the tailnet.
  headlessService = {
    apiVersion = "v1";
    kind = "Service";
    inherit metadata;
    spec = {
      clusterIP = "None";
      inherit selector;
    };
  };

  # Drains of several machines at a time leave a pod.
  disruptionBudget = {
    apiVersion = "policy/v1";
    kind = "PodDisruptionBudget";
    inherit metadata;
    spec = {
      maxUnavailable = 1;
      selector.matchLabels = selector;
    };
  };
in
{
  inherit statefulSet headlessService disruptionBudget;
}
