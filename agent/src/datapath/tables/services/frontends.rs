//! What leads to a Service port: rows of `FRONTENDS_*`, who owns each, and who else wants it.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use aya::maps::{HashMap as BpfHashMap, MapData};
use weir_common::{
    Ipv4, Ipv6, Port as PortNumber, protocol,
    service::{self, FrontendKey, scope},
};

use super::{
    super::{Ipcache, TableError, io_error, is_full},
    FRONTENDS_V4, FRONTENDS_V6, Port, Services,
};
use crate::{
    model::{EndpointSet, FrontendKind, ServicePort, ServicePortKey},
    objects::Family,
};

/// A frontend of either family as its map's key has it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub(in super::super) struct FrontendAddress {
    /// Unspecified: every address of this node.
    pub address: IpAddr,
    pub port: u16,
    pub protocol: u8,
    pub scope: u8,
}

/// What stands behind a frontend.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in super::super) struct Target {
    pub set: EndpointSet,
    pub kind: FrontendKind,
    /// Clients must be in one of the ranges of the port.
    pub restricted: bool,
}

impl Target {
    /// The value in `FRONTENDS_*`, if the port has this number.
    fn value(self, number: u32) -> u32 {
        let kind = match self.kind {
            FrontendKind::NodePort => service::frontend::NODE_PORT,
            _ => 0,
        };
        let ranges = if self.restricted {
            service::frontend::SOURCE_RANGES
        } else {
            0
        };
        service::state_row(number, self.set.number()) | kind | ranges
    }
}

pub(super) fn frontends_of(
    key: &ServicePortKey,
    desired: &ServicePort,
) -> BTreeMap<FrontendAddress, Target> {
    let every_address = match key.family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let frontends = desired.frontends.iter().map(|frontend| {
        let address = FrontendAddress {
            address: frontend.address.unwrap_or(every_address),
            port: frontend.port,
            protocol: key.protocol.number(),
            scope: frontend.scope.number(),
        };
        let target = Target {
            set: frontend.set,
            kind: frontend.kind,
            restricted: frontend.kind == FrontendKind::LoadBalancer
                && desired.source_ranges.is_some(),
        };
        (address, target)
    });
    frontends.collect()
}

impl Services {
    pub(super) fn update_frontends(
        &mut self,
        port: &mut Port,
        wanted: &BTreeMap<FrontendAddress, Target>,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        for (&frontend, &target) in wanted {
            match port.frontends.get(&frontend).copied() {
                Some(known) if known == target => continue,
                Some(known) => self.redirect(frontend, port.number, (known, target), ipcache)?,
                None => self.claim(frontend, port.number, target, ipcache)?,
            }
            port.frontends.insert(frontend, target);
        }
        self.drop_found(port, wanted)?;
        let known = port.frontends.iter();
        let unwanted: Vec<(FrontendAddress, Target)> = known
            .filter(|(frontend, _)| !wanted.contains_key(frontend))
            .map(|(frontend, target)| (*frontend, *target))
            .collect();
        for (frontend, target) in unwanted {
            self.release(frontend, port.number, target, ipcache)?;
            port.frontends.remove(&frontend);
        }
        Ok(())
    }

    /// Deletes the frontends that were found at start and that the port does not want. Those that
    /// cannot be deleted stay noted, and so are tried again.
    pub(super) fn drop_found(
        &mut self,
        port: &mut Port,
        wanted: &BTreeMap<FrontendAddress, Target>,
    ) -> Result<(), TableError> {
        let (number, claimed) = (port.number, &port.frontends);
        let mut failed = None;
        port.found.retain(|frontend| {
            if wanted.contains_key(frontend) || claimed.contains_key(frontend) {
                return false;
            }
            if self.owner(*frontend) != Some(number) {
                // Another port has claimed it; it is not to come back.
                if let Some(others) = self.waiting.get_mut(frontend) {
                    others.retain(|&other| service::service_port_of_row(other) != number);
                }
                return false;
            }
            match self.frontends.delete(*frontend) {
                Ok(()) => {
                    self.owners.remove(frontend);
                    false
                }
                Err(error) => {
                    failed.get_or_insert(error);
                    true
                }
            }
        });
        failed.map_or(Ok(()), Err)
    }

    /// The number of the port that a TCP client of this node reaches at an address, as the programs
    /// look it up. That the address is one at which NodePorts are served is for the caller to know.
    #[must_use]
    pub fn tcp_port_at(&self, frontend: SocketAddr) -> Option<u32> {
        let every_address: IpAddr = match frontend.ip() {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        [frontend.ip(), every_address]
            .into_iter()
            .find_map(|address| {
                self.owner(FrontendAddress {
                    address,
                    port: frontend.port(),
                    protocol: protocol::TCP,
                    scope: scope::INSIDE,
                })
            })
    }

    /// The number of the port that a frontend leads to in the kernel.
    pub(super) fn owner(&self, frontend: FrontendAddress) -> Option<u32> {
        let row = self.owners.get(&frontend)?;
        Some(service::service_port_of_row(*row))
    }

    /// Makes a frontend lead to port `number`. Another port that wants it too waits.
    fn claim(
        &mut self,
        frontend: FrontendAddress,
        number: u32,
        target: Target,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        let exact = frontend.exact_address();
        if let Some(address) = exact {
            ipcache.add_frontend(address, target.kind)?;
        }
        let row = target.value(number);
        let before = self.owners.get(&frontend).copied();
        if before == Some(row) {
            return Ok(());
        }
        if let Err(error) = self.frontends.insert(frontend, row) {
            if let Some(address) = exact {
                ipcache.undo_add_frontend(address, target.kind);
            }
            return Err(error);
        }
        self.owners.insert(frontend, row);
        let is_other = |row: &u32| {
            let owner = service::service_port_of_row(*row);
            owner != number && !self.orphans.contains_key(&owner)
        };
        if let Some(other) = before.filter(is_other) {
            self.waiting.entry(frontend).or_default().push(other);
        }
        Ok(())
    }

    /// Makes a frontend of port `number` lead to another set of the port, or be of another kind: one
    /// update, so that it is never missing.
    fn redirect(
        &mut self,
        frontend: FrontendAddress,
        number: u32,
        (before, after): (Target, Target),
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        if let Some(address) = frontend.exact_address() {
            ipcache.change_frontend(address, before.kind, after.kind)?;
        }
        let row = after.value(number);
        let result = if self.owner(frontend) == Some(number) {
            self.frontends.insert(frontend, row)
        } else {
            let others = self.waiting.get_mut(&frontend).into_iter().flatten();
            for other in others {
                if service::service_port_of_row(*other) == number {
                    *other = row;
                }
            }
            return Ok(());
        };
        match result {
            Ok(()) => {
                self.owners.insert(frontend, row);
                Ok(())
            }
            Err(error) => {
                if let Some(address) = frontend.exact_address() {
                    ipcache.undo_change_frontend(address, before.kind, after.kind);
                }
                Err(error)
            }
        }
    }

    /// Gives a frontend up; a port that waits for it gets it in the same update.
    fn release(
        &mut self,
        frontend: FrontendAddress,
        number: u32,
        target: Target,
        ipcache: &mut Ipcache,
    ) -> Result<(), TableError> {
        let mut others = self.waiting.remove(&frontend).unwrap_or_default();
        if self.owner(frontend) == Some(number) {
            let (result, owner) = match others.last().copied() {
                Some(next) => (self.frontends.insert(frontend, next), Some(next)),
                None => (self.frontends.delete(frontend), None),
            };
            if result.is_err() {
                if !others.is_empty() {
                    self.waiting.insert(frontend, others);
                }
                return result;
            }
            match owner {
                Some(owner) => {
                    others.pop();
                    self.owners.insert(frontend, owner);
                }
                None => {
                    self.owners.remove(&frontend);
                }
            }
        } else {
            others.retain(|&other| service::service_port_of_row(other) != number);
        }
        if !others.is_empty() {
            self.waiting.insert(frontend, others);
        }
        match frontend.exact_address() {
            Some(address) => ipcache.remove_frontend(address, target.kind),
            None => Ok(()),
        }
    }
}

/// Both maps of frontends.
#[derive(Debug)]
pub(in super::super) struct FrontendMaps {
    pub v4: BpfHashMap<MapData, FrontendKey<Ipv4>, u32>,
    pub v6: BpfHashMap<MapData, FrontendKey<Ipv6>, u32>,
    pub max: u32,
}

impl FrontendMaps {
    fn insert(&mut self, frontend: FrontendAddress, row: u32) -> Result<(), TableError> {
        let (map, result) = match frontend.address {
            IpAddr::V4(v4) => {
                let key = frontend.key(Ipv4::from(v4));
                (FRONTENDS_V4, self.v4.insert(key, row, 0))
            }
            IpAddr::V6(v6) => {
                let key = frontend.key(Ipv6::from(v6));
                (FRONTENDS_V6, self.v6.insert(key, row, 0))
            }
        };
        result.map_err(io_error).map_err(|error| {
            if is_full(&error) {
                TableError::Full {
                    map,
                    entries: self.max,
                    remedy: "raise the setting services-max",
                }
            } else {
                TableError::kernel(map, frontend, error)
            }
        })
    }

    fn delete(&mut self, frontend: FrontendAddress) -> Result<(), TableError> {
        let (map, result) = match frontend.address {
            IpAddr::V4(v4) => {
                let key = frontend.key(Ipv4::from(v4));
                (FRONTENDS_V4, self.v4.remove(&key))
            }
            IpAddr::V6(v6) => {
                let key = frontend.key(Ipv6::from(v6));
                (FRONTENDS_V6, self.v6.remove(&key))
            }
        };
        match result.map_err(io_error) {
            Err(error) if !is_absent(&error) => Err(TableError::kernel(map, frontend, error)),
            _ => Ok(()),
        }
    }
}

fn is_absent(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

impl FrontendAddress {
    /// The address, unless it stands for all of the node.
    fn exact_address(self) -> Option<IpAddr> {
        Some(self.address).filter(|address| !address.is_unspecified())
    }

    fn key<A>(self, address: A) -> FrontendKey<A> {
        FrontendKey {
            address,
            port: PortNumber::new(self.port),
            protocol: self.protocol,
            scope: self.scope,
        }
    }
}

impl std::fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let protocol = protocol::name(self.protocol).unwrap_or("?");
        match self.address {
            IpAddr::V4(v4) => write!(f, "{v4}:{}/{protocol}", self.port),
            IpAddr::V6(v6) => write!(f, "[{v6}]:{}/{protocol}", self.port),
        }
    }
}
