# How the sidecar logs its node in: settings in, what its container and the pod need out. containerboot reads it from the
# environment, and refuses combinations; so does this, before anything runs.
{ lib }:
let
  kinds = {
    # From the Secret tailscale-authkey. It ends after 90 days at most.
    auth-key = { };
    # From the Secret tailscale-oauth. It does not end.
    oauth-client = {
      tags = null;
    };
    # No secret at all: the pod's own token, which Kubernetes signs and tailscale's trust credential clientId names; or, with an
    # audience, the identity that a cloud gives its machines.
    workload-identity = {
      tags = null;
      clientId = null;
      audience = "";
    };
  };
  secret = name: key: {
    name = key;
    valueFrom.secretKeyRef = { inherit name key; };
  };
  value = name: value: { inherit name value; };
  tokenDir = "/var/run/secrets/tailscale";
in
{
  kind ? "auth-key",
  ...
}@given:
let
  known = kinds.${kind} or (throw "login.kind ${kind}: it is one of ${toString (lib.attrNames kinds)}");
  login = known // removeAttrs given [ "kind" ];
  unknown = lib.subtractLists (lib.attrNames known) (lib.attrNames login);
  missing = lib.filter (name: login.${name} == null || login.${name} == [ ] || login.${name} == "" && known.${name} == null) (
    lib.attrNames known
  );
  tags =
    if lib.all (lib.hasPrefix "tag:") login.tags then
      lib.concatStringsSep "," login.tags
    else
      throw "login.tags: write them like tag:claude";
  # Nodes of these kinds belong to tags, and containerboot has no variable for them.
  advertised = value "TS_EXTRA_ARGS" "--advertise-tags=${tags}";
  projected = kind == "workload-identity" && login.audience == "";
in
if unknown != [ ] then
  throw "login: ${toString unknown} does not go with kind ${kind}, which takes ${
    if known == { } then "nothing else" else toString (lib.attrNames known)
  }"
else if missing != [ ] then
  throw "login: kind ${kind} needs ${toString missing}"
else
  {
    env =
      {
        auth-key = [ (secret "tailscale-authkey" "TS_AUTHKEY") ];
        oauth-client = [
          (secret "tailscale-oauth" "TS_CLIENT_ID")
          (secret "tailscale-oauth" "TS_CLIENT_SECRET")
          advertised
        ];
        workload-identity = [
          (value "TS_CLIENT_ID" login.clientId)
          (
            if projected then value "TS_ID_TOKEN" "file:${tokenDir}/token" else value "TS_AUDIENCE" login.audience
          )
          advertised
        ];
      }
      .${kind};
    volumeMounts = lib.optional projected {
      name = "tailscale-identity";
      mountPath = tokenDir;
      readOnly = true;
    };
    volumes = lib.optional projected {
      name = "tailscale-identity";
      projected.sources = [
        {
          serviceAccountToken = {
            path = "token";
            # What tailscale expects of a token for this trust credential.
            audience = "api.tailscale.com/${login.clientId}";
            expirationSeconds = 3600;
          };
        }
      ];
    };
    secretIs =
      {
        auth-key = "The auth key comes from the Secret tailscale-authkey (key TS_AUTHKEY), which is yours to create.";
        oauth-client = "The OAuth client comes from the Secret tailscale-oauth (keys TS_CLIENT_ID and TS_CLIENT_SECRET), which is yours to create.";
        workload-identity = "The node logs in by workload identity: there is no Secret.";
      }
      .${kind};
  }
