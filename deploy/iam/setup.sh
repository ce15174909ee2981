#!/usr/bin/env bash
# Brings a project to the state that the specs of deploy/ rely on: interfaces, network, buckets, accounts, roles and,
# with --repository-id, the federation by which GitHub Actions acts as the submit account without a key.
#
#   deploy/iam/setup.sh ENV [--repository-id NUMBER] [--dry-run]
#
# All names come from deploy/env/ENV.toml, as `couponflow check --deploy ENV --json` prints them; call it from the
# project's root with `couponflow` and `python3` on the PATH. Whatever is there stays as it is, so a second run changes
# nothing, and a run that was cut off is finished by the next one. --dry-run asks no service and prints every command
# that an empty project needs. Nothing is ever deleted.
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly folder

fail() { # EXIT_CODE WHAT_AND_WHAT_TO_DO
  printf 'setup.sh: %s\n' "$2" >&2
  exit "$1"
}

environment='' repository_id='' dry_run=no
while (($#)); do
  case $1 in
  --dry-run) dry_run=yes ;;
  --repository-id)
    repository_id=${2-}
    [[ $repository_id =~ ^[0-9]+$ ]] ||
      fail 2 "--repository-id '$repository_id': expected a number; gh api repos/OWNER/NAME --jq .id prints it"
    shift
    ;;
  -*) fail 2 "unknown option $1; usage: setup.sh ENV [--repository-id NUMBER] [--dry-run]" ;;
  *) environment=$1 ;;
  esac
  shift
done
[[ -n $environment ]] || fail 2 'no environment; usage: setup.sh ENV [--repository-id NUMBER] [--dry-run]'

# A name holds no blank and no quote (couponflow.clouding), so a line is a name.
names=$(couponflow check --deploy "$environment" --json | python3 -c '
import json, sys
cloud = json.load(sys.stdin)["cloud"]
for path in sys.argv[1:]:
    value = cloud
    for name in path.split("."):
        value = value[name]
    print(value)
' project region subnetwork network_tag buckets.code buckets.lake buckets.staging \
  service_accounts.etl service_accounts.train service_accounts.submit) ||
  fail 2 "environment $environment has findings; couponflow check --deploy $environment lists them"
{
  read -r project
  read -r region
  read -r network
  read -r tag
  read -r code
  read -r lake
  read -r staging
  read -r etl
  read -r train
  read -r submit
} <<<"$names"

readonly pool=github provider=github node_role=couponflowNode user_key=couponflow-user-key
readonly interfaces=(
  bigquery.googleapis.com compute.googleapis.com dataproc.googleapis.com iam.googleapis.com
  iamcredentials.googleapis.com secretmanager.googleapis.com storage.googleapis.com sts.googleapis.com
)
# What Google's Dataproc Worker role lets an agent do, without that role's objects of every bucket of the project.
readonly node_permissions=(
  dataproc.agents.create dataproc.agents.delete dataproc.agents.get dataproc.agents.list dataproc.agents.update
  dataproc.tasks.lease dataproc.tasks.listInvalidatedLeases dataproc.tasks.reportStatus
  logging.logEntries.create
  monitoring.metricDescriptors.create monitoring.metricDescriptors.get monitoring.metricDescriptors.list
  monitoring.monitoredResourceDescriptors.get monitoring.monitoredResourceDescriptors.list
  monitoring.timeSeries.create
)

change() { # COMMAND...: prints it, and runs it unless this is a dry run
  local word shown=
  for word in "$@"; do
    [[ $word =~ ^[][A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    shown+=" $word"
  done
  printf '%s\n' "${shown# }"
  [[ $dry_run == yes ]] || "$@" >/dev/null
}

# Where a question fails for another reason than absence, the creation that follows fails too and says why.
missing() { # COMMAND...
  [[ $dry_run == yes ]] || ! "$@" >/dev/null 2>&1
}

joined() { # WORD...: with commas
  local IFS=,
  printf '%s' "$*"
}

grant() { # MEMBER ROLE RESOURCE GROUP...: a role on one resource, unless it is there
  local member=$1 role=$2 resource=$3 policy
  shift 3
  if [[ $dry_run == no ]]; then
    policy=$(gcloud "$@" get-iam-policy "$resource" --project "$project" --flatten 'bindings[].members' \
      --format 'csv[no-heading](bindings.role,bindings.members)')
    ! grep -Fxq "$role,$member" <<<"$policy" || return 0
  fi
  change gcloud "$@" add-iam-policy-binding "$resource" --project "$project" --member "$member" --role "$role" \
    --condition None
}

enable_interfaces() {
  local enabled='' interface wanted=()
  [[ $dry_run == yes ]] ||
    enabled=$(gcloud services list --enabled --project "$project" --format 'value(config.name)')
  for interface in "${interfaces[@]}"; do
    grep -Fxq "$interface" <<<"$enabled" || wanted+=("$interface")
  done
  ((${#wanted[@]} == 0)) || change gcloud services enable "${wanted[@]}" --project "$project"
}

# Nodes have no public address: they reach Google's interfaces from inside, each other by the tag, nothing else.
create_network() {
  ! missing gcloud compute networks describe "$network" --project "$project" ||
    change gcloud compute networks create "$network" --project "$project" --subnet-mode custom
  ! missing gcloud compute networks subnets describe "$network" --project "$project" --region "$region" ||
    change gcloud compute networks subnets create "$network" --project "$project" --region "$region" \
      --network "$network" --range 10.10.0.0/20 --enable-private-ip-google-access
  ! missing gcloud compute firewall-rules describe "$tag-internal" --project "$project" ||
    change gcloud compute firewall-rules create "$tag-internal" --project "$project" --network "$network" \
      --direction INGRESS --source-tags "$tag" --target-tags "$tag" --allow tcp,udp,icmp
}

create_bucket() { # NAME LIFECYCLE SOFT_DELETE
  local access
  if missing gcloud storage buckets describe "gs://$1" --project "$project"; then
    change gcloud storage buckets create "gs://$1" --project "$project" --location "$region" \
      --uniform-bucket-level-access --public-access-prevention \
      --lifecycle-file "${folder#"$PWD/"}/lifecycle-$2.json" --soft-delete-duration "$3"
    return
  fi
  access=$(gcloud storage buckets describe "gs://$1" --project "$project" \
    --format 'csv[no-heading](uniform_bucket_level_access,public_access_prevention)')
  [[ ${access,,} == true,enforced ]] ||
    fail 3 "bucket gs://$1: expected uniform access and public access prevention, found '$access'; set both with
  gcloud storage buckets update gs://$1 --uniform-bucket-level-access --public-access-prevention"
}

create_account() { # EMAIL DUTY
  ! missing gcloud iam service-accounts describe "$1" --project "$project" ||
    change gcloud iam service-accounts create "${1%%@*}" --project "$project" --display-name "couponflow: $2"
}

create_node_role() {
  ! missing gcloud iam roles describe "$node_role" --project "$project" ||
    change gcloud iam roles create "$node_role" --project "$project" --title 'couponflow node' --stage GA \
      --permissions "$(joined "${node_permissions[@]}")"
}

# The key of the users' pseudonyms, drawn here and shown to nobody: events.key_secret names its first version. It must
# never be lost: with another key every user is somebody else.
create_user_key() {
  ! missing gcloud secrets describe "$user_key" --project "$project" ||
    change gcloud secrets create "$user_key" --project "$project" --replication-policy user-managed \
      --locations "$region" --data-file - <<<"$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
}

on_bucket() { # EMAIL BUCKET ROLE
  grant "serviceAccount:$1" "roles/storage.$3" "gs://$2" storage buckets
}

grant_roles() {
  local email
  for email in "$etl" "$train"; do
    grant "serviceAccount:$email" "projects/$project/roles/$node_role" "$project" projects
    on_bucket "$email" "$code" objectViewer
    on_bucket "$email" "$lake" objectUser
    on_bucket "$email" "$staging" objectUser
    on_bucket "$email" "$staging" legacyBucketReader # Dataproc's agent looks at the bucket itself
    grant "serviceAccount:$submit" roles/iam.serviceAccountUser "$email" iam service-accounts
  done
  grant "serviceAccount:$etl" roles/secretmanager.secretAccessor "$user_key" secrets # which cleans; training does not
  grant "serviceAccount:$submit" roles/dataproc.editor "$project" projects
  on_bucket "$submit" "$code" objectCreator # creates and cannot overwrite: a release stays what it was
  on_bucket "$submit" "$code" objectViewer
  on_bucket "$submit" "$staging" objectViewer # the driver's output says why a job failed
}

# Only this repository's main branch; its number, not its name, which somebody else could take after a rename.
federate() {
  local number=PROJECT_NUMBER where=(--project "$project" --location global)
  [[ $dry_run == yes ]] || number=$(gcloud projects describe "$project" --format 'value(projectNumber)')
  ! missing gcloud iam workload-identity-pools describe "$pool" "${where[@]}" ||
    change gcloud iam workload-identity-pools create "$pool" "${where[@]}" --display-name GitHub
  ! missing gcloud iam workload-identity-pools providers describe "$provider" "${where[@]}" \
    --workload-identity-pool "$pool" ||
    change gcloud iam workload-identity-pools providers create-oidc "$provider" "${where[@]}" \
      --workload-identity-pool "$pool" --issuer-uri https://token.actions.githubusercontent.com \
      --attribute-mapping google.subject=assertion.sub,attribute.repository_id=assertion.repository_id \
      --attribute-condition \
      "assertion.repository_id == '$repository_id' && assertion.ref == 'refs/heads/main'"
  grant "principalSet://iam.googleapis.com/projects/$number/locations/global/workloadIdentityPools/$pool/attribute.repository_id/$repository_id" \
    roles/iam.workloadIdentityUser "$submit" iam service-accounts
  printf '# variables of the GitHub environment %s, for .github/workflows/publish.yml:\n' "$environment"
  printf '#   WORKLOAD_IDENTITY_PROVIDER=projects/%s/locations/global/workloadIdentityPools/%s/providers/%s\n' \
    "$number" "$pool" "$provider"
  printf '#   SUBMIT_ACCOUNT=%s\n' "$submit"
}

enable_interfaces
create_network
create_bucket "$code" code 7d
create_bucket "$lake" lake 7d
create_bucket "$staging" staging 0
create_account "$etl" 'runs ETL and scoring'
create_account "$train" 'runs training'
create_account "$submit" 'submits workflows'
create_node_role
create_user_key
grant_roles
[[ -z $repository_id ]] || federate
