//! Where a connection of a local pod goes. Pure.

use std::cmp::Reverse;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use crate::directory::{Balancing, Directory, Scope, Service, Workload};
use crate::identity::SpiffeId;
use crate::local::{LocalWorkload, LocalWorkloads};

/// Port of HBONE on every workload that speaks it.
pub const HBONE_PORT: u16 = 15008;

/// How many endpoints of a service are tried.
const TRIES: usize = 3;

/// One way to reach the destination.
#[derive(Clone, Debug)]
pub enum Upstream {
    /// A tunnel to the proxy of another node.
    Hbone {
        /// The workload behind it.
        workload: Arc<Workload>,
        /// Whom its proxy must prove to be.
        identity: SpiffeId,
        /// Its address and its own port.
        endpoint: SocketAddr,
    },
    /// A pod of this node that is in the mesh.
    Local {
        /// The pod.
        destination: Arc<LocalWorkload>,
        /// What the directory knows about it.
        workload: Option<Arc<Workload>>,
        /// Its address and its own port.
        endpoint: SocketAddr,
    },
    /// Something outside the mesh.
    Plain {
        /// What the directory knows about it.
        workload: Option<Arc<Workload>>,
        /// Its address and port.
        endpoint: SocketAddr,
    },
}

/// The ways to a destination, the best first, and the service that it is an address of.
#[derive(Clone, Debug)]
pub struct Choice {
    /// The service, if the destination is a virtual address.
    pub service: Option<Arc<Service>>,
    /// The ways.
    pub upstreams: Vec<Upstream>,
}

impl Choice {
    /// The same ends, as a pod outside the mesh reaches them.
    pub(crate) fn leave_mesh(&mut self) {
        for way in &mut self.upstreams {
            *way = Upstream::Plain {
                workload: way.workload().cloned(),
                endpoint: way.endpoint(),
            };
        }
    }
}

/// Why there is no way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a port of the service.
    #[error("service {0} has no port {1}")]
    NoPort(Arc<str>, u16),
    /// Nothing behind the service is ready.
    #[error("service {0} has no ready endpoint for port {1}")]
    NoEndpoint(Arc<str>, u16),
    /// Whoever gets the address next may be of the mesh too: nothing goes there in plaintext.
    #[error(
        "{0} was the address of a pod of the mesh that has gone, and nobody is known to have it"
    )]
    Gone(IpAddr),
    /// What is ready cannot be reached from the client's address.
    #[error(
        "service {service} has ready endpoints for port {port}, but none with an {family} address; \
         its address of the other family leads to them"
    )]
    OtherFamily {
        /// The service.
        service: Arc<str>,
        /// Its port.
        port: u16,
        /// What the client called by.
        family: &'static str,
    },
}

impl Upstream {
    /// Its address and port.
    #[must_use]
    pub fn endpoint(&self) -> SocketAddr {
        match self {
            Self::Hbone { endpoint, .. }
            | Self::Local { endpoint, .. }
            | Self::Plain { endpoint, .. } => *endpoint,
        }
    }

    /// What the directory knows about it.
    #[must_use]
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Hbone { workload, .. } => Some(workload),
            Self::Local { workload, .. } | Self::Plain { workload, .. } => workload.as_ref(),
        }
    }
}

/// Chooses at this time. `shuffle` gives a number for an endpoint; equal ones in preference are ordered by it.
///
/// # Errors
/// If the destination is a service that cannot be reached, or a pod that has gone.
pub fn choose(
    directory: &Directory,
    local: &LocalWorkloads,
    source: &LocalWorkload,
    destination: SocketAddr,
    now: Instant,
    mut shuffle: impl FnMut(&Workload) -> u64,
) -> Result<Choice, Refusal> {
    let Some(service) = directory.service_at(destination.ip()) else {
        let ip = destination.ip();
        let workload = directory.workload_at(ip);
        if workload.is_none() && local.at(ip).is_none() && directory.has_gone(ip, now) {
            return Err(Refusal::Gone(ip));
        }
        let upstreams = vec![way(local, workload, destination)];
        return Ok(Choice {
            service: None,
            upstreams,
        });
    };
    let port = destination.port();
    if !service.ports.contains_key(&port) {
        return Err(Refusal::NoPort(service.key.clone(), port));
    }
    let client = directory.workload(&source.uid).map(|client| &**client);
    let balancing = &service.balancing;
    let mut other_family = false;
    let mut ranked: Vec<(usize, u64, &Arc<Workload>, SocketAddr)> = directory
        .endpoints(&service.key)
        .filter(|workload| workload.healthy || balancing.allow_unhealthy)
        .filter_map(|workload| {
            let target = *workload.services.get(&service.key)?.get(&port)?;
            let shared = shared(balancing, client, workload);
            if balancing.strict && shared < balancing.preference.len() {
                return None;
            }
            // The client's address can only be kept towards one of the same family.
            let mut addresses = workload.addresses.iter();
            let ip = addresses.find(|ip| ip.is_ipv4() == destination.is_ipv4());
            other_family |= ip.is_none() && !workload.addresses.is_empty();
            let endpoint = SocketAddr::new(*ip?, target);
            Some((shared, shuffle(workload), workload, endpoint))
        })
        .collect();
    let order = |way: &(usize, u64, _, _)| (Reverse(way.0), way.1);
    if ranked.len() > TRIES {
        ranked.select_nth_unstable_by_key(TRIES - 1, order);
        ranked.truncate(TRIES);
    }
    ranked.sort_by_key(order);
    if ranked.is_empty() {
        let service = service.key.clone();
        return Err(match (other_family, destination.is_ipv4()) {
            (false, _) => Refusal::NoEndpoint(service, port),
            (true, v4) => Refusal::OtherFamily {
                service,
                port,
                family: if v4 { "IPv4" } else { "IPv6" },
            },
        });
    }
    let upstreams = ranked
        .into_iter()
        .map(|(_, _, workload, endpoint)| way(local, Some(workload), endpoint))
        .collect();
    Ok(Choice {
        service: Some(service.clone()),
        upstreams,
    })
}

fn way(local: &LocalWorkloads, workload: Option<&Arc<Workload>>, endpoint: SocketAddr) -> Upstream {
    let workload = workload.cloned();
    if let Some(destination) = local.at(endpoint.ip()) {
        return Upstream::Local {
            destination: destination.clone(),
            workload,
            endpoint,
        };
    }
    let Some(known) = workload else {
        return Upstream::Plain { workload, endpoint };
    };
    match known.hbone.clone() {
        // Never in plaintext, also when its proxy turns out not to answer.
        Some(identity) => Upstream::Hbone {
            workload: known,
            identity,
            endpoint,
        },
        None => Upstream::Plain {
            workload: Some(known),
            endpoint,
        },
    }
}

/// How many scopes of the preference, from the first on, client and endpoint share.
fn shared(balancing: &Balancing, client: Option<&Workload>, endpoint: &Workload) -> usize {
    let Some(client) = client else { return 0 };
    balancing
        .preference
        .iter()
        .take_while(|scope| match scope {
            Scope::Region => client.locality.region == endpoint.locality.region,
            Scope::Zone => client.locality.zone == endpoint.locality.zone,
            Scope::Subzone => client.locality.subzone == endpoint.locality.subzone,
            Scope::Node => client.node == endpoint.node,
            Scope::Cluster => client.cluster == endpoint.cluster,
            Scope::Network => client.network == endpoint.network,
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::tests::{service, workload};
    use crate::identity::TrustDomain;

    fn client() -> LocalWorkload {
        LocalWorkload {
            uid: "client".into(),
            namespace: "shop".into(),
            name: "client".into(),
            identity: SpiffeId::new(&TrustDomain::new("td").unwrap(), "shop", "default").unwrap(),
            addresses: vec!["10.0.1.1".parse().unwrap()],
        }
    }

    fn world(balancing: Balancing) -> Directory {
        let mut directory = Directory::default();
        directory.put_service(service(balancing));
        let mut me = workload("client", "10.0.1.1", "n1");
        me.services = Arc::default();
        directory.put_workload(me);
        directory.put_workload(workload("near", "10.0.1.2", "n1"));
        directory.put_workload(workload("far", "10.0.2.2", "n2"));
        directory
    }

    fn ways(directory: &Directory, to: &str) -> Result<Vec<Upstream>, Refusal> {
        let source = client();
        let local = LocalWorkloads::from_iter([source.clone()]);
        choose(
            directory,
            &local,
            &source,
            to.parse().unwrap(),
            Instant::now(),
            |_| 0,
        )
        .map(|choice| choice.upstreams)
    }

    #[test]
    fn a_cluster_ip_becomes_an_endpoint_with_its_own_port() {
        let ways = ways(&world(Balancing::default()), "10.96.0.10:80").unwrap();
        assert_eq!(ways.len(), 2);
        assert!(ways.iter().all(|way| way.endpoint().port() == 8080));
    }

    #[test]
    fn a_port_that_a_service_lacks_is_refused() {
        assert!(matches!(
            ways(&world(Balancing::default()), "10.96.0.10:81"),
            Err(Refusal::NoPort(_, 81))
        ));
    }

    #[test]
    fn a_service_without_ready_endpoints_is_refused() {
        let mut directory = world(Balancing::default());
        for (name, ip) in [("near", "10.0.1.2"), ("far", "10.0.2.2")] {
            directory.put_workload(Workload {
                healthy: false,
                ..workload(name, ip, "n1")
            });
        }
        assert!(matches!(
            ways(&directory, "10.96.0.10:80"),
            Err(Refusal::NoEndpoint(..))
        ));
    }

    #[test]
    fn the_clients_own_node_comes_first_where_it_is_preferred() {
        let balancing = Balancing {
            preference: vec![Scope::Node],
            ..Balancing::default()
        };
        let ways = ways(&world(balancing), "10.96.0.10:80").unwrap();
        assert_eq!(ways[0].endpoint(), "10.0.1.2:8080".parse().unwrap());
    }

    #[test]
    fn strict_leaves_only_what_shares_all() {
        let balancing = Balancing {
            preference: vec![Scope::Node],
            strict: true,
            ..Balancing::default()
        };
        assert_eq!(ways(&world(balancing), "10.96.0.10:80").unwrap().len(), 1);
    }

    #[test]
    fn an_endpoint_is_reached_by_the_family_that_the_client_called_by() {
        let mut directory = world(Balancing::default());
        directory.put_service(crate::directory::Service {
            addresses: ["10.96.0.10", "fd00:96::10"]
                .map(|ip| ip.parse().unwrap())
                .to_vec(),
            ..service(Balancing::default())
        });
        let both = Workload {
            addresses: ["10.0.3.3", "fd00:3::3"]
                .map(|ip| ip.parse().unwrap())
                .to_vec(),
            ..workload("both", "10.0.3.3", "n3")
        };
        directory.put_workload(both);
        let reached = |to: &str| {
            let ways = ways(&directory, to).unwrap();
            let mut ends: Vec<_> = ways.iter().map(|way| way.endpoint().to_string()).collect();
            ends.sort();
            ends
        };
        assert_eq!(reached("[fd00:96::10]:80"), ["[fd00:3::3]:8080"]);
        assert_eq!(
            reached("10.96.0.10:80"),
            ["10.0.1.2:8080", "10.0.2.2:8080", "10.0.3.3:8080"]
        );
        directory.remove_workload("both", Instant::now());
        let refusal = ways(&directory, "[fd00:96::10]:80").unwrap_err();
        let said = refusal.to_string();
        assert!(
            said.contains(
                "shop/web has ready endpoints for port 80, but none with an IPv6 address"
            ),
            "{said}"
        );
        // Nobody of the other family serves either.
        directory.remove_workload("near", Instant::now());
        directory.remove_workload("far", Instant::now());
        let refusal = ways(&directory, "[fd00:96::10]:80").unwrap_err();
        assert!(matches!(refusal, Refusal::NoEndpoint(..)), "{refusal}");
    }

    #[test]
    fn an_unknown_address_is_passed_through() {
        let ways = ways(&world(Balancing::default()), "198.51.100.10:443").unwrap();
        assert!(matches!(
            ways.as_slice(),
            [Upstream::Plain { workload: None, .. }]
        ));
    }

    #[test]
    fn a_remote_mesh_pod_is_never_reached_in_plaintext() {
        let ways = ways(&world(Balancing::default()), "10.0.2.2:9").unwrap();
        assert!(matches!(ways.as_slice(), [Upstream::Hbone { .. }]));
    }

    #[test]
    fn the_address_of_a_mesh_pod_that_has_gone_is_not_reached_in_plaintext() {
        let mut directory = world(Balancing::default());
        directory.remove_workload("far", Instant::now());
        let gone = Refusal::Gone("10.0.2.2".parse().unwrap());
        assert_eq!(ways(&directory, "10.0.2.2:9").unwrap_err(), gone);
        directory.put_workload(workload("next", "10.0.2.2", "n2"));
        let ways = ways(&directory, "10.0.2.2:9").unwrap();
        assert!(matches!(ways.as_slice(), [Upstream::Hbone { .. }]));
    }

    #[test]
    fn who_leaves_the_mesh_is_sent_as_those_outside_it() {
        let (directory, source) = (world(Balancing::default()), client());
        let local = LocalWorkloads::from_iter([source.clone()]);
        for to in ["10.0.2.2:9", "10.0.1.1:9"] {
            let to = to.parse().unwrap();
            let mut choice =
                choose(&directory, &local, &source, to, Instant::now(), |_| 0).unwrap();
            choice.leave_mesh();
            let [way] = &choice.upstreams[..] else {
                panic!("{choice:?}")
            };
            assert!(matches!(way, Upstream::Plain { .. }), "{way:?}");
            assert_eq!(way.endpoint(), to);
        }
    }

    #[test]
    fn a_pod_reaches_itself_locally() {
        let ways = ways(&world(Balancing::default()), "10.0.1.1:9").unwrap();
        assert!(matches!(ways.as_slice(), [Upstream::Local { .. }]));
    }
}
