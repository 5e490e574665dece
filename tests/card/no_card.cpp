// Lets torch's CPU build plan work for a card that is not there: with tensors that know only their shapes (FakeTensorMode) autograd
// still asks the card's backend for its device, streams and events. torch's CUDA build answers by itself.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
namespace {

struct NoCard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    c10::Device card() const { return c10::Device(c10::DeviceType::CUDA, 0); }
    c10::Device exchangeDevice(c10::Device) const override { return card(); }
    c10::Device getDevice() const override { return card(); }
    c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, card()); }
    c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(card()); }
    void record(void **, const c10::Stream &, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void *, const c10::Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
};

struct Hooks : CUDAHooksInterface {
    explicit Hooks(CUDAHooksArgs) {}
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    int getNumGPUs() const override { return 1; }
    DeviceIndex deviceCount() const override { return 1; }
    DeviceIndex current_device() const override { return 0; }
    DeviceIndex getCurrentDevice() const override { return 0; }
};

C10_REGISTER_GUARD_IMPL(CUDA, NoCard);
RegistererCUDAHooksRegistry hooks("CUDAHooks", CUDAHooksRegistry(), RegistererCUDAHooksRegistry::DefaultCreator<Hooks>);

} // namespace
} // namespace at
