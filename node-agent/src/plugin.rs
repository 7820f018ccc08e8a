//! The plugin that holds new pods back: its orders, and its place in the host's CNI chain.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crds::reasons;
use datapath::names::{Names, PROTOCOL};
use guard::conflist::Entry;
use guard::install::{InstallError, Place};
use guard::orders::{Orders, OrdersError};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::sync::mpsc;

use crate::args::PluginArguments;
use crate::desired::Wanted;
use crate::failure::{Complaint, chain};

/// Where it is on the host, and what it is told.
#[derive(Clone, Debug)]
pub(crate) struct Plugin {
    /// None where the agent is not told of the host's folders.
    place: Option<Place>,
    /// Whether new pods are to be held at all.
    enabled: bool,
    /// The program, as it came with the agent.
    program: PathBuf,
    orders: PathBuf,
    records: PathBuf,
    system_namespace: String,
    /// What was last made sure of, and what came of it.
    last: Option<(BTreeSet<String>, Option<Complaint>)>,
    /// Somebody has written where it is on the host since.
    touched: Arc<AtomicBool>,
}

/// What could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PluginError {
    #[error(transparent)]
    Orders(#[from] OrdersError),
    #[error(transparent)]
    Install(#[from] InstallError),
}

impl Plugin {
    pub(crate) fn new(arguments: PluginArguments, system_namespace: String) -> Self {
        let PluginArguments {
            hold_new_pods,
            cni_bin_dir,
            cni_conf_dir,
            cni_program,
            orders,
            records,
        } = arguments;
        Self {
            place: cni_bin_dir
                .zip(cni_conf_dir)
                .map(|(programs, configurations)| Place {
                    programs,
                    configurations,
                }),
            enabled: hold_new_pods,
            program: cni_program,
            orders,
            records,
            system_namespace,
            last: None,
            touched: Arc::default(),
        }
    }

    /// Folder of the records of holds.
    pub(crate) fn records(&self) -> &Path {
        &self.records
    }

    /// Whether new pods are held.
    pub(crate) fn holds(&self) -> bool {
        self.enabled && self.place.is_some()
    }

    /// Makes the host's files say what is wanted; what keeps new pods from being held. Megabytes are compared
    /// for it: in a `full` pass, and when something has changed.
    pub(crate) fn maintain(
        &mut self,
        wanted: &Wanted,
        names: &Names,
        full: bool,
    ) -> Option<Complaint> {
        let touched = self.touched.swap(false, Ordering::Relaxed);
        let namespaces = &wanted.held_namespaces;
        match &self.last {
            Some((last, complaint)) if last == namespaces && !full && !touched => complaint.clone(),
            _ => {
                let complaint = self.try_maintain(namespaces, names).err().map(not_held);
                self.last = Some((namespaces.clone(), complaint.clone()));
                complaint
            }
        }
    }

    fn try_maintain(
        &mut self,
        namespaces: &BTreeSet<String>,
        names: &Names,
    ) -> Result<(), PluginError> {
        if self.enabled {
            self.install(namespaces, names)
        } else {
            self.withdraw()
        }
    }

    fn install(&self, namespaces: &BTreeSet<String>, names: &Names) -> Result<(), PluginError> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        let orders = Orders {
            priority: names.priority_hold(),
            protocol: PROTOCOL,
            records: self.records.clone(),
            namespaces: namespaces.clone(),
        };
        orders.write(&self.orders)?;
        if place.install(&self.program, &self.entry())? {
            tracing::info!(
                folder = %place.configurations.display(),
                "the plugin that holds new pods back is in the host's CNI chain"
            );
        }
        Ok(())
    }

    /// Takes it out of the chain, and its orders away: nobody is held from now on.
    pub(crate) fn withdraw(&mut self) -> Result<(), PluginError> {
        self.last = None;
        if let Some(place) = &self.place {
            place.uninstall()?;
            Orders::withdraw(&self.orders)?;
        }
        Ok(())
    }

    /// Wakes the agent when somebody writes a configuration of CNI or a program of it.
    pub(crate) fn watch(&self, wake: mpsc::Sender<()>) -> Result<(), Errno> {
        let Some(place) = &self.place else {
            return Ok(());
        };
        let changes = Inotify::init(InitFlags::IN_CLOEXEC)?;
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE;
        for folder in [&place.configurations, &place.programs] {
            changes.add_watch(folder, flags)?;
        }
        let touched = self.touched.clone();
        // It waits in the kernel; the process does not wait for it.
        std::thread::spawn(move || {
            while changes.read_events().is_ok() {
                touched.store(true, Ordering::Relaxed);
                if let Err(mpsc::error::TrySendError::Closed(())) = wake.try_send(()) {
                    return;
                }
            }
        });
        Ok(())
    }

    fn entry(&self) -> Entry {
        let never = crds::UNHELD_NAMESPACES.iter().map(ToString::to_string);
        Entry {
            orders: self.orders.display().to_string(),
            unheld: never.chain([self.system_namespace.clone()]).collect(),
        }
    }
}

fn not_held(error: PluginError) -> Complaint {
    Complaint {
        reason: reasons::NEW_PODS_NOT_HELD,
        message: format!(
            "new pods may talk directly until they are enrolled: {}",
            chain(&error)
        ),
    }
}
