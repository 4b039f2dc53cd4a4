# The objects of k8s/overlays/scale-out that take the Deployment's place: several pods, each a tailnet
# node of its own. README.md says how clients find them.
{
  lib,
  # What ./manifests.nix calls its objects, where they live, and which labels choose the pods.
  name,
  namespace,
  labels,
  selector,
  # The Deployment's pod, and its sidecar.
  pod,
  tailscaled,
  # The group that may write to the volume tailscale-state.
  tailscaledUid,
}:
let
  # Pods, and so nodes, are called ${replica}-0, ${replica}-1 and so on. Not ${name}-1, which
  # is what the tailnet calls a second node that asks for the name ${name}.
  replica = "${name}-replica";
  metadata = {
    inherit namespace labels;
    name = replica;
  };

  # A node that comes back must be the same node: the key is kept on the pod's own volume, and so the
  # auth key is used once per pod.
  sidecar = tailscaled // {
    env =
      lib.filter (entry: entry.name != "TS_HOSTNAME" && entry.name != "TS_TAILSCALED_EXTRA_ARGS") tailscaled.env
      ++ [
        {
          name = "TS_HOSTNAME";
          valueFrom.fieldRef.fieldPath = "metadata.name";
        }
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
      selector.matchLabels = selector;
      template = {
        metadata = { inherit labels; };
        spec = pod // {
          initContainers = [ sidecar ];
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
  service = {
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
  inherit statefulSet service disruptionBudget;
}
